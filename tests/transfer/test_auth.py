"""The cluster's key: only who holds it gets in, and it never shows."""

import stat
import time
from pathlib import Path

import pytest
import zmq

from transfer.auth import SIGNATURE_LIFETIME_S, BadSignature, ClusterKey


def test_a_key_survives_its_file_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    key, path = ClusterKey.generate(), tmp_path / "key"
    key.write(path)

    assert ClusterKey.read(path) == key
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert key.secret.hex() not in repr(key)


def test_a_file_that_is_no_key_says_what_was_wanted(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("hello")
    with pytest.raises(ValueError, match="wanted 64 hex digits, found 5 characters"):
        ClusterKey.read(tmp_path / "key")


def test_a_signature_fits_one_body_one_key_and_a_short_time() -> None:
    key, now_s = ClusterKey.generate(), time.time()
    signature = key.sign(b"body", now_s)

    key.verify(signature, b"body", now_s + 1)
    for verifier, given, body, at_s in (
        (key, signature, b"other", now_s),
        (ClusterKey.generate(), signature, b"body", now_s),
        (key, signature, b"body", now_s + SIGNATURE_LIFETIME_S + 1),
        (key, None, b"body", now_s),
        (key, "nonsense", b"body", now_s),
    ):
        with pytest.raises(BadSignature):
            verifier.verify(given, body, at_s)


def test_parts_of_a_mac_cannot_run_into_each_other() -> None:
    key = ClusterKey.generate()

    assert key.mac("p", b"ab", b"c") != key.mac("p", b"a", b"bc") != key.mac("q", b"a", b"bc")


def test_a_socket_hears_only_a_server_with_the_same_key() -> None:
    key = ClusterKey.generate()
    with zmq.Context() as context, context.socket(zmq.PUSH) as server:
        key.secure_server(server)
        port = server.bind_to_random_port("tcp://127.0.0.1")
        with context.socket(zmq.PULL) as friend, context.socket(zmq.PULL) as stranger, context.socket(zmq.PULL) as bare:
            key.secure_client(friend)
            ClusterKey.generate().secure_client(stranger)
            for socket in (stranger, bare, friend):
                socket.connect(f"tcp://127.0.0.1:{port}")

            for number in range(6):
                server.send(bytes([number]))

            heard = [friend.recv() for _ in range(6) if friend.poll(2000)]
            assert heard == [bytes([number]) for number in range(6)]
            assert stranger.poll(50) == bare.poll(50) == 0
        server.linger = 0

"""The router as a process: how it begins, and how it ends."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from http.client import HTTPResponse
from pathlib import Path

import pytest
from pydantic import ValidationError

from router.config import RouterSection, RouterSpec
from transfer.auth import ClusterKey

TokenizerFolder = Callable[[str], Path]
PROGRAM = (
    "import sys; from router.config import RouterSpec; from router.server import run;"
    "run(RouterSpec.model_validate_json(sys.stdin.read()))"
)


def spec(folder: Path, tmp_path: Path, port: int) -> RouterSpec:
    key = tmp_path / "key"
    ClusterKey.generate().write(key)
    return RouterSpec(section=RouterSection(port=port), model="m", model_path=folder, key_file=key, cluster="c")


def begin(given: RouterSpec) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    process.stdin.write(given.model_dump_json())
    process.stdin.close()
    return process


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def listening(process: subprocess.Popen[str], port: int) -> HTTPResponse:
    """The dashboard's stream, as soon as somebody answers."""
    deadline_s = time.monotonic() + 30
    while True:
        try:
            stream: HTTPResponse = urllib.request.urlopen(f"http://127.0.0.1:{port}/api/events", timeout=10)
            return stream
        except OSError:
            assert time.monotonic() < deadline_s
            assert process.poll() is None
            time.sleep(0.05)


@pytest.mark.thorough
def test_sigterm_ends_it_within_five_seconds_though_a_dashboard_listens(
    tokenizer_folder: TokenizerFolder, tmp_path: Path
) -> None:
    port = free_port()
    with begin(spec(tokenizer_folder("chatml"), tmp_path, port)) as process:
        try:
            with listening(process, port) as stream:
                assert stream.readline().startswith(b"data: {")

                process.send_signal(signal.SIGTERM)

                assert process.wait(timeout=5) == 0
        finally:
            process.kill()
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", port))


def test_a_port_in_use_is_one_line_and_exit_code_2(tokenizer_folder: TokenizerFolder, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with begin(spec(tokenizer_folder("chatml"), tmp_path, port)) as process:
            assert process.stderr is not None
            said = process.stderr.read()

            assert process.wait(timeout=30) == 2
    assert said == f"mainstem router: router.port: wanted a free port on 127.0.0.1, found one in use: {port}\n"


def test_a_router_open_to_others_needs_an_api_key(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"api_key_file: wanted a file, as host '0\.0\.0\.0' is not loopback"):
        RouterSection(host="0.0.0.0")

    assert RouterSection(host="0.0.0.0", api_key_file=tmp_path).host == "0.0.0.0"
    assert RouterSection(host="::1").host == "::1"

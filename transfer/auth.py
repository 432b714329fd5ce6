"""The cluster's key: who may register, publish page events and hand pages over.

One secret of 32 bytes for each cluster, made by the launcher and given to every
process in a file that only its owner can read. It is never sent. Three uses:

    HTTP between agents and routers   a signature over (time, body)
    ZeroMQ                            CURVE keys derived from it: who lacks it does not know the public key
    hand-off connections              a proof over both sides' nonces
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zmq
from zmq.utils import z85

KEY_BYTES = 32
SIGNATURE_HEADER = "x-mainstem-signature"
SIGNATURE_LIFETIME_S = 30.0
"""A signed request older than this is refused, so a captured one soon stops working."""


class BadSignature(Exception):
    """The other side does not hold the cluster's key, or its clock is off."""


@dataclass(frozen=True)
class ClusterKey:
    """The secret and what is derived from it. Its repr shows no secret."""

    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.secret) != KEY_BYTES:
            raise ValueError(f"cluster key: wanted {KEY_BYTES} bytes, found {len(self.secret)}")

    @classmethod
    def generate(cls) -> ClusterKey:
        return cls(secrets.token_bytes(KEY_BYTES))

    @classmethod
    def read(cls, path: Path) -> ClusterKey:
        """The key in `path`, as hex. Raises ValueError where it is no key, OSError where it cannot be read."""
        text = path.read_text().strip()
        try:
            return cls(bytes.fromhex(text))
        except ValueError:
            raise ValueError(f"{path}: wanted {2 * KEY_BYTES} hex digits, found {len(text)} characters") from None

    def write(self, path: Path) -> None:
        """Writes it so that only its owner can read it, replacing what was there at once."""
        staged = path.with_suffix(".new")
        descriptor = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as out:
            out.write(self.secret.hex() + "\n")
        staged.replace(path)

    def mac(self, purpose: str, *parts: bytes) -> bytes:
        """32 bytes that only a holder of the key can make, bound to a purpose and to each part's length."""
        message = b"".join(struct.pack("<I", len(part)) + part for part in (purpose.encode(), *parts))
        return hmac.digest(self.secret, message, hashlib.sha256)

    def sign(self, body: bytes, now_s: float) -> str:
        """The value of `SIGNATURE_HEADER` for a request with this body, sent now (seconds since 1970)."""
        stamp = f"{now_s:.3f}"
        return f"{stamp}:{self.mac('http', stamp.encode(), body).hex()}"

    def verify(self, signature: str | None, body: bytes, now_s: float) -> None:
        """Raises BadSignature unless `sign` made it for this body within SIGNATURE_LIFETIME_S."""
        stamp, _, given = (signature or "").partition(":")
        wanted = self.mac("http", stamp.encode(), body).hex()
        if not hmac.compare_digest(wanted.encode(), given.encode(errors="replace")):
            raise BadSignature("signature: wanted one made with this cluster's key, found another or none")
        if abs(now_s - float(stamp)) > SIGNATURE_LIFETIME_S:
            raise BadSignature(f"signature: wanted one of the last {SIGNATURE_LIFETIME_S:.0f} s, check the clocks")

    def secure_server(self, socket: zmq.Socket[Any]) -> None:
        """Lets in only clients that derive the server's public key from the same secret. Call before bind."""
        public, secret = self._curve("server")
        socket.curve_server = True
        socket.curve_publickey, socket.curve_secretkey = public, secret

    def secure_client(self, socket: zmq.Socket[Any]) -> None:
        """The other side of `secure_server`. Call before connect."""
        socket.curve_serverkey = self._curve("server")[0]
        socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()

    def _curve(self, name: str) -> tuple[bytes, bytes]:
        secret = z85.encode(self.mac("curve", name.encode()))
        return zmq.curve_public(secret), secret

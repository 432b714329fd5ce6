"""The keys that clients may use, and whose they are.

sk-one-key-for-all              a line is a key,
alice sk-alices-key             or a name and a key: requests with it are alice's
# a comment
"""

from __future__ import annotations

import base64
import hmac
from pathlib import Path


class ApiKeys:
    """by_key  name of the tenant by key; "" for a key without a name"""

    def __init__(self, by_key: dict[str, str]) -> None:
        self._by_key = {key.encode(): name for key, name in by_key.items()}
        self.first = next(iter(by_key), "")
        """For the launcher's own questions."""

    @classmethod
    def read(cls, path: Path) -> ApiKeys:
        """Raises OSError, ValueError in one line."""
        by_key: dict[str, str] = {}
        for number, line in enumerate(path.read_text().splitlines(), 1):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            if len(words) > 2:
                raise ValueError(f"{path}:{number}: wanted a key, or a name and a key, found {len(words)} words")
            if words[-1] in by_key:
                raise ValueError(f"{path}:{number}: wanted every key once, found one again")
            by_key[words[-1]] = words[0] if len(words) == 2 else ""
        if not by_key:
            raise ValueError(f"{path}: wanted an API key, found an empty file")
        return cls(by_key)

    def tenant(self, authorization: str) -> str | None:
        """Whose request this is, by its header; None where the key is not one of ours.

        As a bearer token, or as the password that a browser asks for, beside any name.
        """
        given = _given(authorization)
        found = None
        for key, name in self._by_key.items():
            # All are compared, so that the time says nothing.
            if hmac.compare_digest(key, given):
                found = name
        return found


def _given(authorization: str) -> bytes:
    """The key in this header; empty where there is none."""
    scheme, _, rest = authorization.partition(" ")
    if scheme == "Bearer":
        return rest.encode()
    if scheme == "Basic":
        try:
            return base64.b64decode(rest, validate=True).partition(b":")[2]
        except ValueError:
            return b""
    return b""

"""Keys of several tenants in one file."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from router.api_keys import ApiKeys


def read(tmp_path: Path, text: str) -> ApiKeys:
    path = tmp_path / "keys"
    path.write_text(text)
    return ApiKeys.read(path)


def test_a_key_says_whose_request_it_is(tmp_path: Path) -> None:
    keys = read(tmp_path, "# all\nsk-1\n\nalice sk-2\n")

    assert keys.tenant("Bearer sk-1") == ""
    assert keys.tenant("Bearer sk-2") == "alice"
    for header in ("", "Bearer ", "Bearer alice", "sk-1", "Basic sk-1"):
        assert keys.tenant(header) is None


def test_a_browser_gives_the_key_as_a_password(tmp_path: Path) -> None:
    keys = read(tmp_path, "alice sk-2\n")

    assert keys.tenant(basic(b"whoever:sk-2")) == "alice"
    for given in (b"sk-2:", b"sk-2", b"alice:sk-2:", b":", b""):
        assert keys.tenant(basic(given)) is None
    for header in ("Basic", "Basic ???", "Basic \u00e4", "basic"):
        assert keys.tenant(header) is None


def basic(given: bytes) -> str:
    return f"Basic {base64.b64encode(given).decode()}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "wanted an API key, found an empty file"),
        ("a b c", ":1: wanted a key, or a name and a key, found 3 words"),
        ("k\nname k", ":2: wanted every key once, found one again"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path, text)

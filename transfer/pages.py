"""Cut a prompt into pages and name each page by everything before it.

Two prompts share a page's id exactly when they share every token up to its end
in the same namespace, so an equal id means reusable KV.

    tokens    a a a a | b b b b | c c            page_tokens = 4
    ids       h(root a)  h(h(root a) b)          the tail "c c" has no id yet

The root is the hash of a namespace: (model, revision, tenant salt or LoRA). One
namespace's pages are invisible to every other.

    id(page) = XXH3-64(parent id as uint64 little-endian, tokens as uint32 little-endian)
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence

import xxhash


def namespace(model: str, revision: str = "", salt: str = "") -> str:
    """The namespace's text. Fields are joined by NUL, which none of them can contain."""
    for field, value in (("model", model), ("revision", revision), ("salt", salt)):
        if "\0" in value:
            raise ValueError(f"{field}: wanted text without NUL, found {value!r}")
    return "\0".join((model, revision, salt))


def root_id(namespace: str) -> int:
    """The id that the first page of every prompt in this namespace has as its parent. Takes any text there is."""
    return xxhash.xxh3_64_intdigest(namespace.encode(errors="surrogatepass"))


def chain_ids(parent: int, tokens: Sequence[int], page_tokens: int) -> list[int]:
    """Ids of the whole pages in `tokens`, in order; a partial last page has none.

    parent       id of the page before tokens[0], or `root_id(...)`
    tokens       token ids, each in [0, 2**32)
    page_tokens  tokens a page, at least 1

    Raises ValueError for a page size below 1, OverflowError for a token outside its range.
    """
    if page_tokens < 1:
        raise ValueError(f"page_tokens: wanted at least 1, found {page_tokens}")
    page_bytes = 4 * page_tokens
    packed = array("I", tokens).tobytes()
    pages = struct.iter_unpack(f"{page_bytes}s", memoryview(packed)[: len(packed) // page_bytes * page_bytes])
    # What is hashed, in one piece: joining parent and page for each page would take as long as hashing it.
    hashed = struct.Struct(f"<Q{4 * page_tokens}s").pack
    digest = xxhash.xxh3_64_intdigest
    return [parent := digest(hashed(parent, page)) for (page,) in pages]

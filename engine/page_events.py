"""Name the pages of SGLang's radix tree, and tell what it stored and dropped.

SGLang's own events carry a content hash without a namespace: the same tokens under
two tenants look alike, and dropping one drops both. So the tree's recording of
stores and removals is replaced by this: here the node's `extra_key` is at hand, and
ids are ours (`transfer.pages`). SGLang's hash is never computed, so nothing has to
be compiled for it.

A node keeps its ids once they are known. The tree splits nodes without telling us;
the back part keeps the node object, so its ids are then too many, and the last ones
are right. The front part is a new object, and gets its ids from its parent again.

Nothing here imports SGLang: a node is anything with `key`, `parent` and attributes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from transfer.pages import chain_ids, namespace, root_id
from transfer.wire import Cleared, PageEvent, Removed, Stored, Tier

TIERS = {"GPU": Tier.DEVICE, "CPU_PINNED": Tier.HOST, "DISK": Tier.DISK, "EXTERNAL": Tier.EXTERNAL}
"""SGLang's names of where a page lies (StorageMedium), and ours. None means GPU, whatever the device."""


class Key(Protocol):
    """SGLang's RadixKey, as far as it is used here."""

    @property
    def extra_key(self) -> str | None: ...
    @property
    def is_bigram(self) -> bool: ...
    def __len__(self) -> int: ...
    def raw_token_ids(self) -> Sequence[int]: ...


class Node(Protocol):
    """SGLang's TreeNode, as far as it is used here. It takes one more attribute: `mainstem_ids`."""

    @property
    def key(self) -> Key: ...
    @property
    def parent(self) -> Any: ...


class PageEvents:
    """Names pages and hands the events on.

    model, revision  the namespace's first parts; the node's extra key is its last
    publish          takes each event, in order; must not block
    """

    def __init__(self, model: str, revision: str, publish: Callable[[PageEvent], None]) -> None:
        self._model = model
        self._revision = revision
        self._publish = publish
        self._roots: dict[str, int] = {}

    def stored(self, node: Node, page_tokens: int, medium: str | None) -> None:
        """The tree has this node now. Draft-model trees (bigram keys) are not prefixes of prompts: no event."""
        if node.key.is_bigram:
            return
        parent, depth = self._parent(node, page_tokens)
        ids = self._ids(node, page_tokens)
        if ids:
            self._publish(Stored(parent, depth, ids, TIERS[medium or "GPU"]))

    def removed(self, node: Node, page_tokens: int, medium: str | None) -> None:
        """The tree dropped this node."""
        if node.key.is_bigram:
            return
        ids = self._ids(node, page_tokens)
        if ids:
            self._publish(Removed(ids, TIERS[medium or "GPU"]))

    def cleared(self) -> None:
        self._publish(Cleared())

    def _ids(self, node: Any, page_tokens: int) -> list[int]:
        """The node's ids; where they are not known, those of its ancestors are made first, from the top."""
        unnamed = []
        while _holds_tokens(node) and len(_known(node)) < len(node.key) // page_tokens:
            unnamed.append(node)
            node = node.parent
        last = self._last(node, page_tokens, unnamed[-1] if unnamed else None)
        for below in reversed(unnamed):
            below.mainstem_ids = chain_ids(last, below.key.raw_token_ids(), page_tokens)
            last = below.mainstem_ids[-1]
        return _known(unnamed[0]) if unnamed else _trimmed(node, page_tokens)

    def _last(self, node: Any, page_tokens: int, below: Any) -> int:
        """The id that the page after this node has as its parent."""
        if _holds_tokens(node):
            return _trimmed(node, page_tokens)[-1]
        return self._root(below.key.extra_key)

    def _parent(self, node: Any, page_tokens: int) -> tuple[int, int]:
        """The id before the node's first page, and the number of pages before it."""
        above, depth = node.parent, 0
        while _holds_tokens(above):
            depth += len(above.key) // page_tokens
            above = above.parent
        if depth == 0:
            return self._root(node.key.extra_key), 0
        return self._ids(node.parent, page_tokens)[-1], depth

    def _root(self, extra_key: str | None) -> int:
        salt = extra_key or ""
        if salt not in self._roots:
            # No router asks for a salt with NUL in it, but an engine may be sent one.
            self._roots[salt] = root_id(namespace(self._model, self._revision) + salt)
        return self._roots[salt]


def _known(node: Any) -> list[int]:
    ids: list[int] = getattr(node, "mainstem_ids", None) or []
    return ids


def _trimmed(node: Any, page_tokens: int) -> list[int]:
    """The ids of a node that the tree may have split: it kept the back part."""
    ids, pages = _known(node), len(node.key) // page_tokens
    if len(ids) > pages:
        ids = node.mainstem_ids = ids[len(ids) - pages :]
    return ids


def _holds_tokens(node: Any) -> bool:
    """False for the tree's root, and for what an evicted node's parent link leads to."""
    return node is not None and node.key is not None and len(node.key) > 0

"""A KV pool and the radix tree over it, as SGLang keeps them, without any KV.

    pool = free pages + pages in the tree + pages that requests hold by themselves

A node is a run of pages, as in SGLang, because SGLang drops whole nodes: what is
evicted, and so what the next request finds, depends on where the runs were split.
Nodes that a request uses are locked up to the root. Of the others the leaf that was
not used for the longest time goes first; its parent is the next leaf.

Pages are named by chain ids: an id stands for its page and all before it. So a run is
found by its first id alone, and equal ids at one depth mean equal prefixes.

Every step costs as much as the path is long, never as much as the tree is large.
"""

from __future__ import annotations

from bisect import bisect_left
from heapq import heappop, heappush

from transfer.wire import Cleared, PageEvent, Removed, Stored


class Node:
    """A run of pages.

    ids     chain ids of the run; a split leaves its back part here
    locks   requests that use this run, or one below
    used    clock of the last match or insertion that passed here
    queued  whether the queue of leaves has an entry for it
    """

    __slots__ = ("children", "ids", "locks", "parent", "queued", "used")

    def __init__(self, parent: Node | None, ids: tuple[int, ...], used: int) -> None:
        self.parent = parent
        self.ids = ids
        self.children = 0
        self.locks = 0
        self.used = used
        self.queued = False

    def __repr__(self) -> str:
        return f"Node({len(self.ids)} pages, children={self.children}, locks={self.locks}, used={self.used})"


class SimCache:
    """The pool of one worker.

    pages   of the whole pool
    root    the id that stands before the first page of every prompt
    events  what was stored and dropped, in order; whoever reads it empties it
    """

    def __init__(self, pages: int, root: int = 0) -> None:
        self.pages = pages
        self.free = pages
        self.held = 0
        """Pages in the tree."""
        self.locked = 0
        """Pages in the tree that a request uses."""
        self.events: list[PageEvent] = []
        self.top = Node(None, (), 0)
        self._root_id = root
        self._by_first: dict[int, Node] = {}
        self._clock = 0
        # Leaves by last use when they were queued. Lazy: an entry that is no longer true is dropped or put back.
        self._leaves: list[tuple[int, int, Node]] = []
        self._entries = 0

    def __repr__(self) -> str:
        return f"SimCache({self.free} free of {self.pages}, held={self.held}, locked={self.locked})"

    @property
    def evictable(self) -> int:
        """Pages that can be had by evicting."""
        return self.held - self.locked

    def holds(self, ids: tuple[int, ...]) -> int:
        """Leading pages of `ids` in the tree. Changes nothing."""
        depth, pages = 0, len(ids)
        while depth < pages and (node := self._by_first.get(ids[depth])) is not None:
            end = depth + len(node.ids)
            if end > pages or node.ids[-1] != ids[end - 1]:
                return depth + _common(node.ids, ids, depth, pages)
            depth = end
        return depth

    def match(self, ids: tuple[int, ...], pages: int) -> tuple[Node, int]:
        """Finds the first `pages` pages of `ids` as far as they are held.

        Returns the last node and the pages up to its end; all on the way are now the latest used.
        A run that is held in part is split, as SGLang does.
        """
        self._clock += 1
        return self._descend(self.top, 0, ids, pages)

    def insert(self, node: Node, depth: int, ids: tuple[int, ...], pages: int) -> tuple[Node, int]:
        """Puts ids[depth:pages] after `node`, which ends at `depth`.

        Returns the last node, and how many leading pages were held before. The pages after those
        have come from the caller; its own copies of the others are the caller's to give back.
        """
        self._clock += 1
        above: Node | None = node
        while above is not None:
            above.used = self._clock
            above = above.parent
        node, known = self._descend(node, depth, ids, pages)
        if known >= pages:
            return node, known
        run = ids[known:pages]
        leaf = Node(node, run, self._clock)
        self._by_first[run[0]] = leaf
        node.children += 1
        self.held += len(run)
        self._queue(leaf)
        self.events.append(Stored(node.ids[-1] if node.ids else self._root_id, known, list(run)))
        return leaf, known

    def lock(self, node: Node) -> None:
        """Keeps this run and all before it until `unlock`."""
        while node.parent is not None:
            if not node.locks:
                self.locked += len(node.ids)
            node.locks += 1
            node = node.parent

    def unlock(self, node: Node) -> None:
        while node.parent is not None:
            node.locks -= 1
            if not node.locks:
                self.locked -= len(node.ids)
                if not node.children:
                    self._queue(node)
            node = node.parent

    def take(self, pages: int) -> None:
        """Pages for a request of its own. Raises RuntimeError where there are not so many: a fault of the caller's."""
        if pages > self.free:
            raise RuntimeError(f"{pages} pages wanted of {self!r}")
        self.free -= pages

    def give(self, pages: int) -> None:
        self.free += pages

    def evict(self, pages: int) -> int:
        """Drops leaves until so many pages came free, or nothing is left that may go. Returns how many did."""
        evicted = 0
        while evicted < pages and self._leaves:
            used, _, node = heappop(self._leaves)
            node.queued = False
            if node.children or node.locks:
                continue
            if used != node.used:
                self._queue(node)
                continue
            self._drop(node)
            evicted += len(node.ids)
        return evicted

    def clear(self) -> None:
        """Drops everything. No page may be locked."""
        if self.locked:
            raise RuntimeError(f"requests still use {self!r}")
        self.free += self.held
        self.held = 0
        self.top.children = 0
        self._by_first.clear()
        self._leaves.clear()
        self.events.append(Cleared())

    def _descend(self, node: Node, depth: int, ids: tuple[int, ...], pages: int) -> tuple[Node, int]:
        while depth < pages and (child := self._by_first.get(ids[depth])) is not None:
            child.used = self._clock
            end = depth + len(child.ids)
            if end > pages or child.ids[-1] != ids[end - 1]:
                common = _common(child.ids, ids, depth, pages)
                return self._split(child, common), depth + common
            node, depth = child, end
        return node, depth

    def _split(self, node: Node, pages: int) -> Node:
        """Cuts the run after `pages` pages. The front is a new node; the back stays what locks point at."""
        front = Node(node.parent, node.ids[:pages], self._clock)
        front.locks = node.locks
        front.children = 1
        node.parent = front
        node.ids = node.ids[pages:]
        self._by_first[front.ids[0]] = front
        self._by_first[node.ids[0]] = node
        return front

    def _drop(self, leaf: Node) -> None:
        parent = leaf.parent
        assert parent is not None, "the root is no leaf"
        del self._by_first[leaf.ids[0]]
        self.free += len(leaf.ids)
        self.held -= len(leaf.ids)
        self.events.append(Removed(list(leaf.ids)))
        parent.children -= 1
        if not parent.children and not parent.locks and parent.parent is not None:
            self._queue(parent)

    def _queue(self, leaf: Node) -> None:
        if not leaf.queued:
            leaf.queued = True
            self._entries += 1
            heappush(self._leaves, (leaf.used, self._entries, leaf))


def _common(run: tuple[int, ...], ids: tuple[int, ...], depth: int, pages: int) -> int:
    """Leading pages of `run` that ids[depth:pages] has too, where it has not all of them.

    Once two chains differ, they differ for good: so the last page of a run tells whether it is there as a whole.
    """
    longest = min(len(run), pages - depth)
    return bisect_left(range(longest), True, key=lambda page: run[page] != ids[depth + page])

"""The cluster's radix index: which worker holds which prefix.

Pages are named by everything before them, so a node is found by its id alone and
no edge labels are kept:

    root ── a ── b ── c          holders   a {0,1}   b {0,1}   c {0}
                  └── d                    d {1}

One rule makes matching cheap: a worker that holds a page holds all pages before
it. So along a prompt the known pages come first, and the set of holders only
shrinks. The deepest known page is found by bisection, and then only the depths
are visited where the set changes: O((1 + holders) log pages) look-ups for a prompt.

The index has a hard size. A new page that does not fit takes the place of the leaf
that was not used for the longest time; leaves, so that the rule stays true.

Nodes lie in flat arrays, one slot each: a million Python objects that point at each
other would be visited by every full garbage collection.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from heapq import heapify, heappop, heappush

from transfer.wire import Tier

NODE_BYTES = 160
"""What one page costs: 45 bytes in arrays, the rest its entry in the dict of ids (measured, see its test)."""

_NONE = -1
"""The slot that is no slot."""


class Index:
    """Pages by id, and who holds them.

    max_bytes  bound on `bytes`; at least one page always fits
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.max_nodes = max(1, max_bytes // NODE_BYTES)
        self.evicted = 0
        """Pages dropped to stay below the bound, since the start."""
        self.orphans = 0
        """Pages not taken in because what comes before them is not known to be held, since the start."""
        self._slots: dict[int, int] = {}
        self._bits: dict[str, int] = {}
        self._held: dict[int, int] = {}
        self._incomplete = 0
        """Bits of the workers that hold pages which were not taken in, or were dropped."""
        self._clock = 0

        self._ids = array("Q")
        self._parent = array("i")
        self._first_child = array("i")
        self._next_sibling = array("i")
        self._previous_sibling = array("i")
        self._holders: list[int] = []
        self._depth = array("I")
        self._used = array("Q")
        self._queued = array("b")
        self._free: list[int] = []
        # Leaves by last use when they were queued. Lazy: an entry that is no longer true is skipped or put back.
        self._leaves: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self._slots)

    def __repr__(self) -> str:
        return f"Index({len(self)} of {self.max_nodes} pages, held={ {name: self.held(name) for name in self._bits} })"

    @property
    def bytes(self) -> int:
        """Estimate of the memory taken."""
        return len(self._slots) * NODE_BYTES

    def held(self, worker: str) -> int:
        """Pages that the index knows this worker to hold."""
        bit = self._bits.get(worker)
        return 0 if bit is None else self._held[bit]

    def complete(self, worker: str) -> bool:
        """Whether all that this worker is said to hold is known here: nothing was dropped, nothing an orphan.

        Once it is not, it is again only after `cleared` or `forget`.
        """
        bit = self._bits.get(worker)
        return bit is None or not self._incomplete >> bit & 1

    def match(self, ids: Sequence[int]) -> dict[str, int]:
        """Leading pages of `ids` that each worker holds; workers that hold none are left out.

        ids  the prompt's chain ids, first page first
        """
        slots = self._slots
        pages = bisect_left(range(len(ids)), True, key=lambda page: ids[page] not in slots)
        if not pages:
            return {}
        self._clock += 1
        self._used[slots[ids[pages - 1]]] = self._clock

        found: dict[int, int] = {}
        seen = 0
        while pages:
            holders = self._holders[slots[ids[pages - 1]]]
            for bit in _bits(holders & ~seen):
                found[bit] = pages
            seen = holders
            pages = self._first_with_holders(ids, pages, holders)
        return {name: found[bit] for name, bit in self._bits.items() if bit in found}

    def _first_with_holders(self, ids: Sequence[int], pages: int, holders: int) -> int:
        """The first of `pages` pages whose holders are `holders`, which those of the last one are."""
        return bisect_left(range(pages), True, key=lambda page: self._holders[self._slots[ids[page]]] == holders)

    def stored(self, worker: str, parent: int, depth: int, ids: Sequence[int], tier: Tier = Tier.DEVICE) -> bool:
        """Notes that `worker` holds `ids`, one after the other, after `parent`.

        parent  id of the page before ids[0]; not looked at where depth is 0
        depth   pages before ids[0]

        False where the pages before are not known to be held by this worker (they were evicted
        here, or an event was lost): then nothing is noted. Other tiers than the device are not matched yet.
        """
        if tier is not Tier.DEVICE:
            return True
        bit = self._bit(worker)
        before = _NONE
        if depth:
            before = self._slots.get(parent, _NONE)
            if before == _NONE or not self._holders[before] >> bit & 1:
                self.orphans += len(ids)
                self._incomplete |= 1 << bit
                return False
        self._clock += 1
        for offset, page in enumerate(ids):
            slot = self._slots.get(page)
            if slot is None:
                if len(self._slots) >= self.max_nodes and not self._evict_leaf(keep=before):
                    self._incomplete |= 1 << bit
                    break
                slot = self._insert(page, before, depth + offset)
            if not self._holders[slot] >> bit & 1:
                self._holders[slot] |= 1 << bit
                self._held[bit] += 1
            self._used[slot] = self._clock
            before = slot
        if before != _NONE:
            self._queue_leaf(before)
        return True

    def removed(self, worker: str, ids: Sequence[int], tier: Tier = Tier.DEVICE) -> None:
        """Notes that `worker` holds `ids` no more, nor what comes after them. Unknown ids are no error."""
        bit = self._bits.get(worker)
        if tier is not Tier.DEVICE or bit is None:
            return
        for page in ids:
            slot = self._slots.get(page)
            if slot is not None:
                self._release(slot, bit)

    def cleared(self, worker: str) -> None:
        """Notes that `worker` holds nothing. Visits every page."""
        bit = self._bits.get(worker)
        if bit is None:
            return
        self._incomplete &= ~(1 << bit)
        if not self._held[bit]:
            return
        tops = [slot for slot in self._slots.values() if self._parent[slot] == _NONE and self._holders[slot] >> bit & 1]
        for slot in tops:
            self._release(slot, bit)

    def forget(self, worker: str) -> None:
        """`cleared`, and its place in the sets is free for another worker."""
        self.cleared(worker)
        bit = self._bits.pop(worker, None)
        if bit is not None:
            del self._held[bit]

    def _bit(self, worker: str) -> int:
        bit = self._bits.get(worker)
        if bit is None:
            taken = set(self._bits.values())
            bit = next(free for free in range(len(taken) + 1) if free not in taken)
            self._bits[worker] = bit
            self._held[bit] = 0
        return bit

    def _release(self, top: int, bit: int) -> None:
        """Takes the worker from this page and from all below that it holds, deepest first."""
        mask = 1 << bit
        if not self._holders[top] & mask:
            return
        below = [top]
        for slot in below:
            child = self._first_child[slot]
            while child != _NONE:
                if self._holders[child] & mask:
                    below.append(child)
                child = self._next_sibling[child]
        for slot in reversed(below):
            self._holders[slot] &= ~mask
            self._held[bit] -= 1
            # Whoever holds a child holds this page, so a page without holders has no children left by now.
            if not self._holders[slot]:
                self._delete(slot)

    def _insert(self, page: int, parent: int, depth: int) -> int:
        if self._free:
            slot = self._free.pop()
            self._ids[slot], self._parent[slot], self._depth[slot] = page, parent, depth
        else:
            slot = len(self._ids)
            for column, value in (
                (self._ids, page),
                (self._parent, parent),
                (self._depth, depth),
                (self._first_child, _NONE),
                (self._next_sibling, _NONE),
                (self._previous_sibling, _NONE),
                (self._used, 0),
                (self._queued, 0),
            ):
                column.append(value)
            self._holders.append(0)
        self._slots[page] = slot
        if parent != _NONE:
            sibling = self._first_child[parent]
            self._next_sibling[slot] = sibling
            if sibling != _NONE:
                self._previous_sibling[sibling] = slot
            self._first_child[parent] = slot
        return slot

    def _delete(self, slot: int) -> None:
        """Removes a page without children; its slot can be used again."""
        parent, after, before = self._parent[slot], self._next_sibling[slot], self._previous_sibling[slot]
        if before != _NONE:
            self._next_sibling[before] = after
        elif parent != _NONE:
            self._first_child[parent] = after
        if after != _NONE:
            self._previous_sibling[after] = before
        del self._slots[self._ids[slot]]
        self._next_sibling[slot] = self._previous_sibling[slot] = _NONE
        self._queued[slot] = 0
        self._free.append(slot)
        if parent != _NONE and self._first_child[parent] == _NONE:
            # Used at least as lately as what was built on it.
            self._used[parent] = max(self._used[parent], self._used[slot])
            self._queue_leaf(parent)

    def _queue_leaf(self, slot: int) -> None:
        if self._queued[slot] or self._first_child[slot] != _NONE:
            return
        self._queued[slot] = 1
        heappush(self._leaves, (self._used[slot], slot))
        if len(self._leaves) > 2 * len(self._slots) + 1024:
            self._rebuild_queue()

    def _rebuild_queue(self) -> None:
        """Drops the entries of slots that came and went, which would otherwise pile up in an index below its bound."""
        self._leaves = [(self._used[slot], slot) for slot in self._slots.values() if self._first_child[slot] == _NONE]
        for slot in self._slots.values():
            self._queued[slot] = self._first_child[slot] == _NONE
        heapify(self._leaves)

    def _evict_leaf(self, keep: int) -> bool:
        """Drops the least recently used leaf other than `keep`. False where there is none."""
        kept: tuple[int, int] | None = None
        dropped = False
        while self._leaves and not dropped:
            used, slot = heappop(self._leaves)
            if not self._queued[slot]:
                continue
            if self._first_child[slot] != _NONE:
                self._queued[slot] = 0
            elif self._used[slot] != used:
                heappush(self._leaves, (self._used[slot], slot))
            elif slot == keep:
                kept = (used, slot)
                self._queued[slot] = 0
            else:
                self._drop(slot)
                dropped = True
        if kept is not None and not self._queued[keep]:
            self._queued[keep] = 1
            heappush(self._leaves, kept)
        return dropped

    def _drop(self, slot: int) -> None:
        for bit in _bits(self._holders[slot]):
            self._held[bit] -= 1
        self._incomplete |= self._holders[slot]
        self._holders[slot] = 0
        self._delete(slot)
        self.evicted += 1


def _bits(mask: int) -> Iterator[int]:
    """Numbers of the bits that are set, lowest first."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low

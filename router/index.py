"""The cluster's radix index: which worker holds which prefix, and where.

Pages are named by everything before them, so a node is found by its id alone and
no edge labels are kept:

    namespace ── a ── b ── c          holders   a {0,1}   b {0,1}   c {0}
                      └── d                     d {1}

One rule makes matching cheap: a worker that holds a page holds all pages before
it. So along a prompt the known pages come first, and the set of holders only
shrinks. The deepest known page is found by bisection, and then only the depths
are visited where the set changes: O((1 + sets) log pages) look-ups for a prompt.

With tiers the rule says: down a chain, a worker's pages only get farther.

    worker 0    a DEVICE   b DEVICE, HOST   c HOST      match(DEVICE) 2, match(HOST) 3

A page's nearest tier counts, so "the device, or the host's memory too" is such a
shrinking set again. Workers evict from the ends of chains, tier by tier, which
keeps the rule; an event that would break it is not noted.

The index has a hard size. A new page that does not fit takes the place of the leaf
that was not used for the longest time; leaves, so that the rule stays true.

Memory. A node is a slot in flat columns: 48 bytes, and 8 to 16 in the table that
finds it by its id; 4 more for each tier beyond the device that was ever heard of.
Who holds it is one small number for a whole set of workers (`router.holder_sets`).
A million Python objects would take three times that, and every full garbage
collection would visit them.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

import msgspec
import numpy as np
import numpy.typing as npt

from router.holder_sets import EMPTY, HolderSets, bits, members
from router.leaf_order import LeafOrder
from router.page_table import MOST_ENTRY_BYTES, NONE, PageTable
from transfer.undecodable import UNDECODABLE
from transfer.wire import Stored, Tier

NODE_BYTES = 96
"""What one page may cost, all counted. What its columns leave of it is for the sets of holders."""
COLUMN_BYTES = 48
"""Of one slot, without the table and without tiers beyond the device."""
TIER_BYTES = 4
LEAST_BYTES = 64 * 1024
"""An index takes no less for its sets of holders, however small its bound."""
VERSION = 1
"""Of a dump."""

_NOWHERE = len(Tier)
"""Farther than every tier."""

Dump = bytes
"""An index written down."""


class _Header(msgspec.Struct, array_like=True):
    version: int


class _Held(msgspec.Struct, array_like=True):
    """All that one worker holds."""

    worker: str
    complete: bool
    pages: list[Stored]


class _Dump(msgspec.Struct, array_like=True):
    version: int
    workers: list[_Held]


class Index:
    """Pages by id, and who holds them.

    max_bytes  bound on `bytes`, from some 100 kB on; at least one page always fits
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.max_nodes = max(1, max_bytes // NODE_BYTES)
        """Bound on pages and namespaces together; one namespace comes free."""
        self.evicted = 0
        """Pages dropped to stay below the bound, since the start."""
        self.orphans = 0
        """Pages not taken in because what comes before them is not known to be held, since the start."""
        self._bits: dict[str, int] = {}
        self._names: list[str] = []
        """By bit."""
        self._free_bits: list[int] = []
        self._held: list[list[int]] = []
        """By bit: pages by their nearest tier."""
        self._incomplete = 0
        """Bits of the workers that hold pages which were not taken in, or were dropped."""
        self._clock = 0

        self._ids = array("Q")
        self._parent = array("i")
        """NONE for a namespace's root and for a free slot."""
        self._first_child = array("i")
        self._next_sibling = array("i")
        """Of a free slot: the next free one."""
        self._previous_sibling = array("i")
        self._root = array("i")
        """Slot of the namespace; a root's own."""
        self._used = array("Q")
        """Clock of the last use; of a root, its pages."""
        self._rows = [array("i")]
        """By tier: the slot's set of holders. Tiers that nobody spoke of yet have no column."""
        self._sets = HolderSets()
        self._table = PageTable(self._ids)
        self._leaves = LeafOrder()
        self._first_free = NONE
        self._roots = 0

    def __len__(self) -> int:
        """Pages."""
        return len(self._table) - self._roots

    def __repr__(self) -> str:
        return f"Index({len(self)} of {self.max_nodes} pages, held={ {name: self.held(name) for name in self._bits} })"

    @property
    def fill(self) -> float:
        """Pages, and roots of namespaces, over the most that there may be."""
        return len(self._table) / self.max_nodes

    @property
    def bytes(self) -> int:
        """Memory taken: columns, the table, sets of holders. Columns and table never shrink."""
        per_worker = 300 * len(self._names)
        return (
            sum(map(sys.getsizeof, (*self._columns(), *self._rows)))
            + self._table.bytes
            + self._leaves.bytes
            + self._sets.bytes
            + per_worker
        )

    def held(self, worker: str, tier: Tier = Tier.EXTERNAL) -> int:
        """Pages that the index knows this worker to hold, in `tier` or a nearer one."""
        bit = self._bits.get(worker)
        return 0 if bit is None else sum(self._held[bit][: tier + 1])

    def complete(self, worker: str) -> bool:
        """Whether all that this worker is said to hold is known here: nothing was dropped, nothing an orphan.

        Once it is not, it is again only after `cleared` or `forget`.
        """
        bit = self._bits.get(worker)
        return bit is None or not self._incomplete >> bit & 1

    def namespaces(self) -> dict[int, int]:
        """Pages by root id. Looks at every slot."""
        return {self._ids[root]: self._used[root] for root in self._root_slots()}

    def match(self, ids: Sequence[int], tier: Tier = Tier.DEVICE) -> dict[str, int]:
        """Leading pages of `ids` that each worker holds in `tier` or a nearer one; workers that hold none are left out.

        ids  the prompt's chain ids, first page first
        """
        find = self._table.find
        low, pages, slot = 0, len(ids), NONE
        while low < pages:
            middle = (low + pages) // 2
            found = find(ids[middle])
            if found == NONE:
                pages = middle
            else:
                low, slot = middle + 1, found
        if slot == NONE:
            return {}
        self._clock += 1
        self._touch(slot)

        rows = self._rows[: tier + 1]
        lengths: dict[str, int] = {}
        first = find(ids[0])
        everybody = self._holders(first, rows)
        seen = 0
        while (holders := self._holders(slot, rows)) != everybody:
            lengths.update(dict.fromkeys(members(holders & ~seen, self._names), pages))
            seen = holders
            # The last page whose holders are not the same. The first page is one of those.
            low, high, slot = 1, pages - 1, first
            while low < high:
                middle = (low + high) // 2
                found = find(ids[middle])
                if self._holders(found, rows) == holders:
                    high = middle
                else:
                    low, slot = middle + 1, found
            pages = low
        lengths.update(dict.fromkeys(members(holders & ~seen, self._names), pages))
        return lengths

    def stored(self, worker: str, parent: int, depth: int, ids: Sequence[int], tier: Tier = Tier.DEVICE) -> bool:
        """Notes that `worker` holds `ids`, one after the other, after `parent`, in `tier`.

        parent  id of the page before ids[0]; where depth is 0, the root id of a namespace
        depth   pages before ids[0]

        False where the pages before are not known to be held by this worker, in this tier or a nearer one
        (they were evicted here, or an event was lost): then nothing is noted.
        """
        bit = self._bit(worker)
        while len(self._rows) <= tier:
            self._rows.append(array("i", [EMPTY]) * len(self._ids))
        before = self._table.find(parent)
        if depth:
            known = before != NONE and self._nearest(before, 1 << bit) <= tier
        else:
            known = before == NONE or self._parent[before] == NONE
        if not known:
            return self._orphaned(bit, len(ids))
        self._clock += 1
        slots: list[int] = []
        for page in ids:
            slot = self._table.find(page)
            if slot == NONE or before == NONE or self._parent[slot] != before:
                break
            slots.append(slot)
            before = slot
        self._hold(slots, bit, tier)
        new = ids[len(slots) :]
        if new and self._table.find(new[0]) != NONE:
            # Known after another page. An id has one past, so one of the two is wrong.
            return self._orphaned(bit, len(new))
        if new:
            before = self._store_new(bit, parent, before, new, tier)
        elif slots:
            self._touch(before)
        self._bound_sets(keep=before)
        return True

    def removed(self, worker: str, ids: Sequence[int], tier: Tier = Tier.DEVICE) -> None:
        """Notes that `worker` holds `ids` in `tier` no more, nor what comes after them where nothing nearer is left.

        What comes after a page that still lies in a farther tier stays there, and no nearer. Unknown ids are no error.
        """
        bit = self._bits.get(worker)
        if bit is None or tier >= len(self._rows):
            return
        for page in ids:
            slot = self._table.find(page)
            if slot != NONE:
                self._release(slot, bit, range(tier, tier + 1))
        self._bound_sets(keep=NONE)

    def cleared(self, worker: str) -> None:
        """Notes that `worker` holds nothing. Looks at every slot."""
        bit = self._bits.get(worker)
        if bit is None:
            return
        self._incomplete &= ~(1 << bit)
        if any(self._held[bit]):
            parents = np.asarray(self._parent)
            slots = np.flatnonzero(self._slots_of(bit))
            tops: list[int] = slots[parents[parents[slots]] == NONE].tolist()
            del parents
            for slot in tops:
                self._release(slot, bit, range(len(self._rows)))

    def forget(self, worker: str) -> None:
        """`cleared`, and its place in the sets is free for another worker."""
        self.cleared(worker)
        bit = self._bits.pop(worker, None)
        if bit is not None:
            self._free_bits.append(bit)

    def forget_namespace(self, root: int) -> int:
        """Drops all pages below this root id and returns their number. Whoever held one is no longer complete."""
        slot = self._table.find(root)
        if slot == NONE or self._parent[slot] != NONE:
            return 0
        pages = self._below(slot)
        self._drop(pages[::-1])
        return len(pages)

    def sample(self, worker: str, modulus: int, residue: int) -> set[int]:
        """Ids that the worker holds, in any tier, and that leave `residue` when divided by `modulus`.

        Looks at every slot. Raises ValueError where the residue is not in [0, modulus).
        """
        if not 0 <= residue < modulus:
            raise ValueError(f"residue: wanted 0 to {modulus - 1}, found {residue}")
        bit = self._bits.get(worker)
        if bit is None:
            return set()
        ids = np.asarray(self._ids)[self._slots_of(bit)]
        return set(ids[ids % np.uint64(modulus) == np.uint64(residue)].tolist())

    def snapshot(self, worker: str) -> Iterator[Stored]:
        """All that the worker holds, parents before children, tier by tier. The index must not change meanwhile."""
        bit = self._bits.get(worker)
        if bit is None:
            return
        roots = self._root_slots()
        for tier in range(len(self._rows)):
            for root in roots:
                yield from self._runs(root, 1 << bit, Tier(tier))

    def restore(self, worker: str, pages: Iterable[Stored]) -> None:
        """Applies a snapshot, beside what the worker is known to hold."""
        for run in pages:
            self.stored(worker, run.parent, run.depth, run.ids, run.tier)

    def dump(self) -> Dump:
        """All that is known, for `restored`. The order of use and the counters are not in it."""
        held = [_Held(name, self.complete(name), list(self.snapshot(name))) for name in self._bits]
        return msgspec.msgpack.encode(_Dump(VERSION, held))

    @classmethod
    def restored(cls, dump: Dump, max_bytes: int) -> Index:
        """An index that knows what `dump` says. Raises ValueError for bytes that are no dump of this version."""
        try:
            version = msgspec.msgpack.decode(dump, type=_Header).version
            if version != VERSION:
                raise ValueError(f"dump of an index: wanted version {VERSION}, found {version}")
            workers = msgspec.msgpack.decode(dump, type=_Dump).workers
        except UNDECODABLE as error:
            raise ValueError(f"dump of an index: {error}") from error
        index = cls(max_bytes)
        for held in workers:
            bit = index._bit(held.worker)
            index.restore(held.worker, held.pages)
            if not held.complete:
                index._incomplete |= 1 << bit
        return index

    # Workers

    def _bit(self, worker: str) -> int:
        bit = self._bits.get(worker)
        if bit is None:
            if not self._free_bits:
                self._free_bits.append(len(self._names))
                self._names.append("")
                self._held.append([])
            bit = self._free_bits.pop()
            self._bits[worker], self._names[bit], self._held[bit] = bit, worker, [0] * len(Tier)
        return bit

    def _orphaned(self, bit: int, pages: int) -> bool:
        self.orphans += pages
        self._incomplete |= 1 << bit
        return False

    # Holders of a page

    def _holders(self, slot: int, rows: Sequence[array[int]]) -> int:
        """Bits of those that hold the page in one of these tiers."""
        masks = self._sets.masks
        if len(rows) == 1:
            return masks[rows[0][slot]]
        holders = 0
        for row in rows:
            holders |= masks[row[slot]]
        return holders

    def _nearest(self, slot: int, mask: int, least: int = Tier.DEVICE) -> int:
        """The nearest tier, `least` or farther, in which this worker holds the page; _NOWHERE where there is none."""
        masks = self._sets.masks
        for tier in range(least, len(self._rows)):
            if masks[self._rows[tier][slot]] & mask:
                return tier
        return _NOWHERE

    def _hold(self, slots: Sequence[int], bit: int, tier: Tier) -> None:
        """Adds the worker to the holders of these pages. Neighbours often have the same: these move together."""
        sets, rows, held, mask = self._sets, self._rows[tier], self._held[bit], 1 << bit
        for row, same in groupby(slots, rows.__getitem__):
            holders = sets.masks[row]
            if holders & mask:
                continue
            run = list(same)
            for slot in run if len(self._rows) > 1 else ():
                nearest = self._nearest(slot, mask)
                if nearest != _NOWHERE:
                    held[nearest] -= 1
                    held[min(nearest, tier)] += 1
                    held[tier] -= 1
            held[tier] += len(run)
            new = sets.take(holders | mask, len(run))
            for slot in run:
                rows[slot] = new
            sets.give(row, len(run))

    def _release(self, top: int, bit: int, tiers: range) -> None:
        """Takes the worker from this page in these tiers, and from those below as the rule demands."""
        mask, held = 1 << bit, self._held[bit]
        leaving: list[list[int]] = [[] for _ in self._rows]
        before = self._nearest(top, mask)
        if before == _NOWHERE:
            return
        after = before if before < tiers.start else self._nearest(top, mask, tiers.stop)
        for tier in tiers:
            leaving[tier].append(top)
        below, nearest = [top], [after]
        if before != after:
            held[before] -= 1
            if after != _NOWHERE:
                held[after] += 1
            for slot, bound in zip(below, nearest, strict=True):
                child = self._first_child[slot]
                while child != NONE:
                    before = self._nearest(child, mask)
                    if before < bound:
                        after = _NOWHERE if bound == _NOWHERE else self._nearest(child, mask, bound)
                        held[before] -= 1
                        if after != _NOWHERE:
                            held[after] += 1
                        for tier in range(before, min(bound, len(self._rows))):
                            leaving[tier].append(child)
                        below.append(child)
                        nearest.append(after)
                    child = self._next_sibling[child]
        for tier, slots in enumerate(leaving):
            self._leave(slots, mask, tier)
        # Whoever holds a child holds this page, so all below a page without holders has none either.
        below.reverse()
        self._delete([slot for slot in below if all(rows[slot] == EMPTY for rows in self._rows)])

    def _leave(self, slots: Sequence[int], mask: int, tier: int) -> None:
        """Takes the worker from the holders of these pages in one tier, where it is one of them."""
        sets, rows = self._sets, self._rows[tier]
        for row, same in groupby(slots, rows.__getitem__):
            holders = sets.masks[row]
            if holders & mask:
                run = list(same)
                new = sets.take(holders & ~mask, len(run))
                for slot in run:
                    rows[slot] = new
                sets.give(row, len(run))

    def _slots_of(self, bit: int) -> npt.NDArray[np.bool_]:
        """By slot: whether this worker holds the page, in any tier."""
        having = self._sets.rows_with(bit)
        held: npt.NDArray[np.bool_] = having[np.asarray(self._rows[0])]
        for rows in self._rows[1:]:
            held |= having[np.asarray(rows)]
        return held

    # The tree

    def _columns(self) -> tuple[array[int], ...]:
        return (
            self._ids,
            self._parent,
            self._first_child,
            self._next_sibling,
            self._previous_sibling,
            self._root,
            self._used,
        )

    def _root_slots(self) -> list[int]:
        """Slots of the namespaces. A root always has children."""
        roots = (np.asarray(self._parent) == NONE) & (np.asarray(self._first_child) != NONE)
        slots: list[int] = np.flatnonzero(roots).tolist()
        return slots

    def _below(self, top: int) -> list[int]:
        """All pages below this slot, parents before children."""
        found = [top]
        for slot in found:
            child = self._first_child[slot]
            while child != NONE:
                found.append(child)
                child = self._next_sibling[child]
        return found[1:]

    def _runs(self, root: int, mask: int, tier: Tier) -> Iterator[Stored]:
        """What the worker holds in this tier, as chains. Those in farther tiers only have no such page below them."""
        starts = [(root, 0)]
        while starts:
            slot, depth = starts.pop()
            parent, run = NONE, array("Q")
            first = depth
            while slot != NONE:
                if slot != root and self._sets.masks[self._rows[tier][slot]] & mask:
                    if not run:
                        parent, first = self._parent[slot], depth - 1
                    run.append(self._ids[slot])
                elif run:
                    yield Stored(self._ids[parent], first, run.tolist(), tier)
                    run = array("Q")
                child, slot_below = self._first_child[slot], NONE
                while child != NONE:
                    if self._nearest(child, mask) <= tier:
                        if slot_below == NONE:
                            slot_below = child
                        else:
                            starts.append((child, depth + 1))
                    child = self._next_sibling[child]
                slot, depth = slot_below, depth + 1
            if run:
                yield Stored(self._ids[parent], first, run.tolist(), tier)

    def _store_new(self, bit: int, parent: int, before: int, ids: Sequence[int], tier: Tier) -> int:
        """Puts pages that nobody holds yet after the slot `before`, or after a new root. The last one's slot."""
        rootless = before == NONE
        room = self._make_room(len(ids) + rootless, keep=before)
        if rootless:
            before = self._insert([parent], NONE, NONE)[0]
            self._root[before] = before
            self._used[before] = 0
            self._roots += 1
            room -= 1
        if room < len(ids):
            self._incomplete |= 1 << bit
            ids = ids[:room]
        if not ids:
            return before
        root = self._root[before]
        slots = self._insert(ids, before, root)
        self._used[root] += len(ids)
        sibling = self._first_child[before]
        if sibling != NONE:
            self._previous_sibling[sibling] = slots[0]
            self._next_sibling[slots[0]] = sibling
        elif before != root:
            self._leaves.remove(before)
        self._first_child[before] = slots[0]
        self._leaves.append(slots[-1])

        row = self._sets.take(1 << bit, len(ids))
        rows = self._rows[tier]
        for slot in slots:
            rows[slot] = row
        self._held[bit][tier] += len(ids)
        return slots[-1]

    def _insert(self, ids: Sequence[int], before: int, root: int) -> list[int]:
        """Slots for these pages, each the child of the one before it; `before` itself is not told of the first."""
        slots: list[int] = []
        free = self._first_free
        while free != NONE and len(slots) < len(ids):
            slots.append(free)
            free = self._next_sibling[free]
        self._first_free = free
        fresh = len(ids) - len(slots)
        if fresh:
            slots += range(len(self._ids), len(self._ids) + fresh)
            zeros = array("i", bytes(4 * fresh))
            for column in (*self._columns()[1:-1], *self._rows):
                column.extend(zeros)
            for column in (self._ids, self._used):
                column.extend(array("Q", bytes(8 * fresh)))
            self._leaves.extend(zeros)
        for slot, page, parent, child in zip(slots, ids, (before, *slots), (*slots[1:], NONE), strict=False):
            self._ids[slot] = page
            self._parent[slot] = parent
            self._first_child[slot] = child
            self._next_sibling[slot] = NONE
            self._previous_sibling[slot] = NONE
            self._root[slot] = root
            self._used[slot] = self._clock
        self._table.add(slots)
        return slots

    def _delete(self, slots: Sequence[int], keep: int = NONE) -> None:
        """Removes pages without holders, children before parents. With its last page a namespace goes, except `keep`.

        None of them has children that are not among them.
        """
        place = NONE  # who stands among the leaves for the page at hand: itself, or the end of a chain that goes whole
        for number, slot in enumerate(slots, 1):
            parent, after, before = self._parent[slot], self._next_sibling[slot], self._previous_sibling[slot]
            if after != NONE:
                self._previous_sibling[after] = before
            if before != NONE:
                self._next_sibling[before] = after
            else:
                self._first_child[parent] = after
            if place == NONE:
                place = slot
            if self._first_child[parent] == NONE and number < len(slots) and slots[number] == parent:
                self._used[parent] = max(self._used[parent], self._used[slot])
                continue
            self._unqueue(place, parent, self._used[slot])
            place = NONE
        if slots:
            root = self._root[slots[0]]
            self._used[root] -= len(slots)
            self._free(slots)
            if not self._used[root] and root != keep:
                self._free([root])
                self._roots -= 1

    def _unqueue(self, leaf: int, parent: int, used: int) -> None:
        """A leaf goes, last used at `used`: where `parent` has no other children, it is a leaf now."""
        if self._first_child[parent] != NONE or self._parent[parent] == NONE:
            self._leaves.remove(leaf)
        elif self._used[parent] > used:
            # Used by itself since. Its place is somewhere among those used later; at their end it is found at once.
            self._leaves.remove(leaf)
            self._leaves.append(parent)
        else:
            # Used at least as lately as what was built on it.
            self._used[parent] = used
            self._leaves.replace(leaf, parent)

    def _free(self, slots: Sequence[int]) -> None:
        self._table.remove(slots)
        for slot in slots:
            self._parent[slot] = self._first_child[slot] = NONE
            self._next_sibling[slot] = self._first_free
            self._first_free = slot

    # The bound

    def _touch(self, slot: int) -> None:
        """This is the deepest page that was used just now: those before it count as used with it."""
        if self._parent[slot] == NONE:
            return
        self._used[slot] = self._clock
        if self._first_child[slot] == NONE:
            self._leaves.touch(slot)

    def _make_room(self, slots: int, keep: int) -> int:
        """Evicts until so many more slots may be used. How many may be: fewer where nothing but `keep` is left."""
        while (room := self.max_nodes + 1 - len(self._table)) < slots:
            if not self._evict(slots - room, keep):
                break
        return max(0, room)

    def _bound_sets(self, keep: int) -> None:
        """Evicts until the sets of holders take no more than what `max_nodes` pages leave of the memory."""
        node_bytes = (COLUMN_BYTES + TIER_BYTES * (len(self._rows) - 1)) * 17 // 16 + MOST_ENTRY_BYTES
        most_bytes = max(LEAST_BYTES, self.max_bytes - self.max_nodes * node_bytes)
        while self._sets.needed_bytes > most_bytes:
            if not self._evict(1, keep):
                break

    def _evict(self, most: int, keep: int) -> bool:
        """Drops the least recently used leaf other than `keep`, and what is the next such leaf then: `most` at most.

        False where there is none.
        """
        slot = self._leaves.oldest
        if slot == keep and slot != NONE:
            slot = self._leaves.newer(slot)
        if slot == NONE:
            return False
        chain, used = [slot], self._used[slot]
        while len(chain) < most:
            parent = self._parent[slot]
            alone = self._first_child[parent] == slot and self._next_sibling[slot] == NONE
            if not alone or parent in (keep, self._root[slot]) or self._used[parent] > used:
                break
            chain.append(parent)
            slot = parent
        self._drop(chain, keep)
        self.evicted += len(chain)
        return True

    def _drop(self, slots: Sequence[int], keep: int = NONE) -> None:
        """Takes these pages, children before parents, from all who hold them: they are no longer complete."""
        for rows, same in groupby(slots, lambda slot: [column[slot] for column in self._rows]):
            run = list(same)
            dropped = 0
            for tier, row in enumerate(rows):
                holders = self._sets.masks[row]
                for bit in bits(holders & ~dropped):
                    self._held[bit][tier] -= len(run)
                dropped |= holders
                self._sets.give(row, len(run))
                for slot in run:
                    self._rows[tier][slot] = EMPTY
            self._incomplete |= dropped
        self._delete(slots, keep)

"""Offsets for buffers: no two that are alive together share a byte, except where one may lie over the other.

Source: the bound and the greedy orders are those of offset planners for inference (arXiv:2001.03288). Differs: pairs
that may overlap, and a search that also packs from the top.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Over = Mapping[tuple[int, int], int]
"""For items (a, b): a may overlap b if a starts at least so many bytes below b."""


@dataclass(frozen=True, slots=True)
class Item:
    """A buffer to place: a size, and the closed interval of ops during which it is alive."""

    num_bytes: int
    first_op: int
    last_op: int

    def overlaps(self, other: "Item") -> bool:
        """Both are alive during some op."""
        return self.first_op <= other.last_op and other.first_op <= self.last_op


def lower_bound(items: Sequence[Item], over: Over | None = None) -> int:
    """Largest number of bytes alive during one op, less what may lie over each other."""
    saved = savings(items, over or {})
    return max(
        (
            sum(
                item.num_bytes - (saved.get(index, 0) if item.first_op == at.first_op else 0)
                for index, item in enumerate(items)
                if item.first_op <= at.first_op <= item.last_op
            )
            for at in items
        ),
        default=0,
    )


def savings(items: Sequence[Item], over: Over) -> dict[int, int]:
    """For each item how much of it can lie over what dies while it is written."""
    saved: dict[int, int] = {}
    for (written, read), lead in over.items():
        together = items[written].num_bytes + items[read].num_bytes
        saving = together - max(items[read].num_bytes + lead, items[written].num_bytes)
        saved[written] = min(saved.get(written, 0) + max(saving, 0), items[written].num_bytes)
    return saved


def place(
    items: Sequence[Item], over: Over | None = None, *, tries: int = 600, restarts: int = 5, seed: int = 0
) -> list[int]:
    """Offsets as low as the search finds.

    Greedy orders first; then, for at most 10 items that may not overlap, every order that matters; else simulated
    annealing over the order of placing and over which items are packed from the top. Stops at the lower bound.

    Args:
        items: What to place.
        over: For (a, b): a may overlap b if a starts at least so many bytes below b.
        tries: Changes of one annealing.
        restarts: Annealings, each from the best greedy order.
        seed: Of the first one.
    """
    return _Search(items, over or {}).run(tries, restarts, seed)


class _Search:
    def __init__(self, items: Sequence[Item], over: Over) -> None:
        self.items, self.over = items, over
        self.bound = lower_bound(items, over)
        self.conflicts = _conflicts(items, over)

    def run(self, tries: int, restarts: int, seed: int) -> list[int]:
        best = min((self._packing(*start) for start in self._starts()), key=lambda packing: packing.height)
        if best.height > self.bound and len(self.items) <= 10 and not self.over:
            return _exact(self.items, self.conflicts, best.offsets, best.height, self.bound)
        start = best
        for number in range(restarts):
            if best.height == self.bound:
                break
            found = self._anneal(start, tries, random.Random(seed + number))
            best = min(best, found, key=lambda packing: packing.height)
        return best.offsets

    def _starts(self) -> list[tuple[list[int], list[bool]]]:
        items, everything = self.items, range(len(self.items))
        length, pressure = [item.last_op - item.first_op for item in items], _pressure(items)
        orders = [
            sorted(everything, key=lambda i: -items[i].num_bytes),
            sorted(everything, key=lambda i: (-length[i], -items[i].num_bytes)),
            sorted(everything, key=lambda i: -items[i].num_bytes * (length[i] + 1)),
            sorted(everything, key=lambda i: (items[i].first_op, -items[i].num_bytes)),
            sorted(everything, key=lambda i: (-items[i].last_op, -items[i].num_bytes)),
            sorted(everything, key=lambda i: (-pressure[i], -items[i].num_bytes)),
            sorted(everything, key=lambda i: (-pressure[i], -items[i].first_op)),
        ]
        nowhere, short = [False] * len(items), [each < 5 for each in length]
        return [(order, from_top) for order in orders for from_top in (nowhere, short)]

    def _anneal(self, start: "_Packing", tries: int, rng: random.Random) -> "_Packing":
        count, temperature = len(self.items), 0.005 * max(self.bound, 1)
        best = current = start
        for _ in range(tries if count > 1 else 0):
            if best.height == self.bound:
                break
            order, from_top = list(current.order), list(current.from_top)
            # What reaches the top is what must go elsewhere: place it earlier, or from the other side.
            ends = (offset + item.num_bytes for offset, item in zip(current.offsets, self.items, strict=True))
            highest = rng.choice([i for i, end in enumerate(ends) if end == current.height])
            what = rng.random()
            if what < 0.4:
                order.remove(highest)
                order.insert(rng.randrange(count), highest)
            elif what < 0.6:
                from_top[highest] = not from_top[highest]
            if what > 0.3:
                order.insert(rng.randrange(count), order.pop(rng.randrange(count)))
                if rng.random() < 0.5:
                    other = rng.randrange(count)
                    from_top[other] = not from_top[other]
            found = self._packing(order, from_top)
            worse = found.height - current.height
            if worse <= 0 or rng.random() < math.exp(-worse / temperature):
                current = found
            best = min(best, found, key=lambda packing: packing.height)
        return best

    def _packing(self, order: list[int], from_top: list[bool]) -> "_Packing":
        offsets = [-1] * len(order)
        for i in order:
            at = self._highest(offsets, i) if from_top[i] else -1
            offsets[i] = at if at >= 0 else _lowest(self.conflicts, offsets, i)
        return _Packing(order, from_top, offsets, height(self.items, offsets))

    def _highest(self, offsets: Sequence[int], i: int) -> int:
        """The highest place below the bound; negative if there is none."""
        at = self.bound - self.items[i].num_bytes
        taken = (
            (offsets[j] + low, offsets[j] + high) for j, (low, high) in self.conflicts[i].items() if offsets[j] >= 0
        )
        for low, high in sorted(taken, key=lambda each: -each[1]):
            if low < at < high:
                at = low
        return at


@dataclass(frozen=True, slots=True)
class _Packing:
    order: list[int]
    from_top: list[bool]
    offsets: list[int]
    height: int


_Conflicts = Sequence[Mapping[int, tuple[int, int]]]
"""For each item and each other: the offsets, relative to the other's, that lie strictly between are forbidden."""


def _conflicts(items: Sequence[Item], over: Over) -> _Conflicts:
    conflicts: list[dict[int, tuple[int, int]]] = [{} for _ in items]
    for i, a in enumerate(items):
        for j, b in enumerate(items):
            if i != j and a.overlaps(b):
                low = -over[i, j] if (i, j) in over else -a.num_bytes
                high = over.get((j, i), b.num_bytes)
                conflicts[i][j] = (low, high)
    return conflicts


def _pressure(items: Sequence[Item]) -> list[int]:
    """For each item the most bytes that are alive while it is."""
    end = max((item.last_op for item in items), default=-1) + 1
    alive = [sum(item.num_bytes for item in items if item.first_op <= t <= item.last_op) for t in range(end)]
    return [max(alive[item.first_op : item.last_op + 1], default=0) for item in items]


def _first_fit(conflicts: _Conflicts, order: Sequence[int]) -> list[int]:
    offsets = [-1] * len(conflicts)
    for i in order:
        offsets[i] = _lowest(conflicts, offsets, i)
    return offsets


def _lowest(conflicts: _Conflicts, offsets: Sequence[int], i: int, start: int = 0) -> int:
    """The lowest place from ``start`` on; items with an offset below 0 are not placed yet."""
    taken = sorted((offsets[j] + low, offsets[j] + high) for j, (low, high) in conflicts[i].items() if offsets[j] >= 0)
    at = start
    for low, high in taken:
        if low < at < high:
            at = high
    return at


def _exact(items: Sequence[Item], conflicts: _Conflicts, best: list[int], peak: int, bound: int) -> list[int]:
    """Branch and bound. Any plan can be built bottom to top, each item at the lowest place not below the one before."""

    def extend(offsets: list[int], placed: tuple[int, ...], floor: int) -> None:
        nonlocal best, peak
        if peak == bound:
            return
        if len(placed) == len(items):
            best, peak = list(offsets), height(items, offsets)
            return
        for i in range(len(items)):
            if i in placed:
                continue
            at = _lowest(conflicts, offsets, i, floor)
            if at + items[i].num_bytes < peak:
                offsets[i] = at
                extend(offsets, (*placed, i), at)
                offsets[i] = -1

    extend([-1] * len(items), (), 0)
    return best


def height(items: Sequence[Item], offsets: Sequence[int]) -> int:
    """Bytes from 0 to the highest end."""
    return max((offset + item.num_bytes for item, offset in zip(items, offsets, strict=True)), default=0)

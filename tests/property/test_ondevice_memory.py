"""The offset planner, for any set of buffers."""

from itertools import permutations

from hypothesis import given, settings
from hypothesis import strategies as st

from efftrain.ondevice.placement import Item, _conflicts, _first_fit, height, lower_bound, place

STEPS = 12


@st.composite
def buffers(draw: st.DrawFn, most: int = 24) -> list[Item]:
    items = []
    for _ in range(draw(st.integers(0, most))):
        first = draw(st.integers(0, STEPS - 1))
        items.append(Item(4 * draw(st.integers(0, 50)), first, draw(st.integers(first, STEPS - 1))))
    return items


@settings(max_examples=150, deadline=None)
@given(buffers())
def test_no_two_live_buffers_overlap_and_the_bound_is_one(items: list[Item]) -> None:
    offsets = place(items)
    for i, (a, at) in enumerate(zip(items, offsets, strict=True)):
        assert at >= 0
        assert at % 4 == 0
        for b, other in list(zip(items, offsets, strict=True))[:i]:
            apart = at + a.num_bytes <= other or other + b.num_bytes <= at
            assert apart or not a.overlaps(b)
    live = [sum(i.num_bytes for i in items if i.first_op <= step <= i.last_op) for step in range(STEPS)]
    assert lower_bound(items) == max(live)
    assert height(items, offsets) >= lower_bound(items)


@settings(max_examples=60, deadline=None)
@given(buffers(most=6))
def test_small_plans_are_optimal(items: list[Item]) -> None:
    # Some order of placing each buffer as low as it can go gives the optimum.
    conflicts = _conflicts(items, {})
    orders = permutations(range(len(items)))
    best = min((height(items, _first_fit(conflicts, order)) for order in orders), default=0)
    assert height(items, place(items)) == best

"""The report of a device plan: whole RAM by part, the arena as address against time, and what each pass saves."""

from collections.abc import Mapping, Sequence
from typing import Any

from efftrain.report.page import Page, Section, Table
from efftrain.report.timeline import largest_buffers, ram_bar, timeline, waterfall_bars
from efftrain.units import format_bytes, format_count

PASS_TITLES = {
    "none": "no pass",
    "remove_dead_code": "+ dead gradients and masks gone",
    "update_at_once": "+ updates at once",
    "tile_channels": "+ blocks in tiles of channels",
    "stream_rows": "+ rows streamed",
    "overlap": "+ outputs over dying inputs",
    "moves": "+ gradients moved",
}
"""Rows of a waterfall, in words."""

RAM_PARTS = {
    "arena": "arena_bytes",
    "trained state": "trained_state_bytes",
    "scratch outside the arena": "scratch_bytes",
    "stack, reserved": "stack_bytes",
    "static data": "static_bytes",
}
"""What adds up to ``total_ram_bytes``."""


def device_page(plan: Mapping[str, Any], facts: Mapping[str, str]) -> Page:
    """The report of one plan.

    Args:
        plan: What ``efftrain ondevice plan --json --waterfall`` prints: ``MemoryPlan.to_dict()`` with ``model, scheme,
            rounding, input_shape, input_scale, input_zero_point``, ``num_forward_ops``, ``alive_bytes`` (one number an
            op) and ``waterfall`` (a list of steps; may be empty).
        facts: Versions, seed, command.
    """
    gap = plan["arena_bytes"] - plan["arena_lower_bound_bytes"]
    proof = "proven minimal" if gap == 0 else f"at most {gap:,} B above the smallest possible"
    share = plan["total_ram_bytes"] / plan["board_ram_bytes"]
    fits = "" if share <= 1 else " It does not fit."
    height, width, channels = plan["input_shape"]
    lead = (
        f"Scheme {plan['scheme']}, input {channels}x{height}x{width}, batch 1: a training step needs "
        f"{plan['total_ram_bytes']:,} B of RAM, {100 * share:.1f} % of {plan['board']}, stack included; "
        f"the arena is {proof}.{fits} Inputs are int8: real value / {plan['input_scale']:.6g}, to the nearest, plus "
        f"{plan['input_zero_point']}."
    )
    sections = [_ram(plan), _arena(plan, proof), _largest(plan)]
    if plan["waterfall"]:
        sections.append(_waterfall(plan))
    return Page(f"{plan['model']} on {plan['board']}: memory of a training step", lead, sections, facts)


def _ram(plan: Mapping[str, Any]) -> Section:
    rows = [(part, f"{plan[key]:,} B") for part, key in RAM_PARTS.items()]
    rows += [("RAM in all", f"{plan['total_ram_bytes']:,} B of {plan['board_ram_bytes']:,} B")]
    rows += [
        (
            "flash: constants, and an allowance for code",
            f"{plan['flash_bytes']:,} B of {plan['board_flash_bytes']:,} B",
        ),
        ("multiply-adds, forward", format_count(plan["macs_forward"])),
        ("multiply-adds, backward and update", format_count(plan["macs_backward"])),
    ]
    text = (
        "All of it is planned before anything is compiled, enforced by the linker script, and checked against what "
        "an emulated board touches."
    )
    parts = {part: plan[key] for part, key in RAM_PARTS.items()}
    bar = ram_bar("ram", parts, plan["board_ram_bytes"], caption=f"RAM by part, against that of {plan['board']}.")
    return Section("RAM by part", text, [Table(("part", "size"), rows)], [bar])


def _arena(plan: Mapping[str, Any], proof: str) -> Section:
    picture = timeline(
        "arena",
        plan,
        caption=(
            f"Above, the {len(plan['buffers'])} buffers of the arena ({plan['arena_bytes']:,} B, {proof}): address "
            "against time, one column an op. Where two lie over each other, an output is written over an input that "
            "dies. Below, the bytes that must be there during each op; none of a plan of these ops in this order can "
            "be lower than the highest column. Point at a buffer or a column for its name and bytes."
        ),
    )
    return Section("The arena, op by op", "", [], [picture])


def _largest(plan: Mapping[str, Any]) -> Section:
    rows = [
        (
            str(number),
            buffer["name"],
            buffer["kind"],
            f"{buffer['num_bytes']:,}",
            f"{buffer['offset']:,}",
            f"{buffer['first_op']} - {buffer['last_op']}",
            _op(plan["ops"][buffer["first_op"]]),
        )
        for number, buffer in enumerate(largest_buffers(plan), 1)
    ]
    columns = ("no.", "buffer", "kind", "bytes", "offset", "ops", "written by")
    return Section("Its largest buffers", "", [Table(columns, rows, "With their numbers in the picture", 3)])


def _op(name: str) -> str:
    return name if len(name) <= 48 else name[:45] + "..."


def waterfall_table(steps: Sequence[Mapping[str, Any]]) -> Table:
    """One row a pass, bytes."""
    rows = [
        (
            PASS_TITLES.get(step["name"], step["name"]),
            f"{step['max_live_forward_bytes']:,}",
            f"{step['max_live_backward_bytes']:,}",
            f"{step['arena_bytes']:,}",
            f"{step['arena_lower_bound_bytes']:,}",
            f"{step['trained_state_bytes']:,}",
            f"{step['total_ram_bytes']:,}",
        )
        for step in steps
    ]
    columns = ("passes", "max live forward", "max live backward", "arena", "lower bound", "trained state", "RAM in all")
    return Table(columns, rows, "Bytes")


def _waterfall(plan: Mapping[str, Any]) -> Section:
    steps = plan["waterfall"]
    text = (
        "Each row is a plan of its own: the passes up to it have run and all buffers are placed again. No pass changes "
        "a bit of what is learned."
    )
    whole = steps[0]["total_ram_bytes"] / steps[-1]["total_ram_bytes"]
    caption = (
        f"RAM in all from no pass to all of them: {format_bytes(steps[0]['total_ram_bytes'])} to "
        f"{format_bytes(steps[-1]['total_ram_bytes'])}, a factor of {whole:.1f}. Marks: the most bytes alive at once "
        "in the forward (F) and in the backward pass (B)."
    )
    titles = [PASS_TITLES.get(step["name"], step["name"]) for step in steps]
    picture = waterfall_bars("waterfall", steps, titles, plan["board_ram_bytes"], plan["board"], caption=caption)
    return Section("What each pass saves", text, [waterfall_table(steps)], [picture])

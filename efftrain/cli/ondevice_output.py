"""What ``efftrain ondevice`` shows: tables on stdout, and the report of a plan as a page."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from efftrain.cli.console import print_table
from efftrain.units import format_bytes, format_count

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from efftrain.ondevice import Board, Program
    from efftrain.ondevice.memory import MemoryPlan

SchemeRow = tuple[str, "MemoryPlan", "tuple[Board, MemoryPlan] | None"]
"""A scheme, its plan, and the smallest board that can run it, with the plan there."""


def print_plan(model: str, program: Program, plan: MemoryPlan) -> None:
    """RAM by part, flash and MACs."""
    gap = plan.arena_gap_bytes
    proof = "proven minimal" if gap == 0 else f"at most {gap} B above the smallest possible"
    height, width, channels = program.input_shape
    rows = [
        ("arena", plan.arena_bytes, proof),
        ("trained state", plan.trained_state_bytes, f"rounding {program.rounding}"),
        ("scratch outside the arena", plan.scratch_bytes, ""),
        ("stack", plan.stack_bytes, "reserved"),
        ("static", plan.static_bytes, ""),
        ("RAM in all", plan.total_ram_bytes, f"of {plan.board_ram_bytes:,} B of {plan.board}"),
        ("flash", plan.flash_bytes, f"of {plan.board_flash_bytes:,} B, an allowance for code included"),
    ]
    print(f"{model}, scheme {program.scheme.name}, input {channels}x{height}x{width}\n")
    for title, num_bytes, note in rows:
        print(f"{title:<28}{num_bytes:>11,} B   {note}".rstrip())
    repeated = sum(block.repeated_macs for block in plan.tiled_blocks)
    again = f", {format_count(repeated)} of them repeated" if plan.tiled_blocks else ""
    macs = f"{format_count(plan.macs_forward)} forward, {format_count(plan.macs_backward)} backward{again}"
    print(f"{'MACs of a step':<28}{plan.macs_forward + plan.macs_backward:>11,}     {macs}")
    for block in plan.tiled_blocks:
        print(f"  {block.tile_channels} of {block.channels} channels at a time: {block.name}")


def print_compared(rows: list[SchemeRow]) -> None:
    """A row a scheme: what it costs, and the smallest board for it."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("scheme")
    for heading in ("RAM", "trained state", "flash", "MACs backward"):
        table.add_column(heading, justify="right")
    table.add_column("smallest board that can run it")
    for name, plan, smallest in rows:
        table.add_row(
            escape(name),
            format_bytes(plan.total_ram_bytes),
            format_bytes(plan.trained_state_bytes),
            format_bytes(plan.flash_bytes),
            format_count(plan.macs_backward),
            escape(_board_of(plan, smallest)),
        )
    print_table(table)


def _board_of(plan: MemoryPlan, smallest: tuple[Board, MemoryPlan] | None) -> str:
    if smallest is None:
        return "none of those known"
    board, there = smallest
    return board.name if there is plan else f"{board.name}, in tiles: {format_bytes(there.total_ram_bytes)}"


def print_run(found: dict[str, Any], target: str, steps: int) -> None:
    """What was measured, and whether the bits agree."""
    lines = [("steps", f"{steps} on {target}")]
    if found["measured_ram_bytes"] is not None:
        stack = f"{found['measured_stack_bytes']:,} B of it stack"
        lines.append(("RAM measured", f"{found['measured_ram_bytes']:,} B, {stack}"))
        lines.append(("flash linked", f"{found['measured_flash_bytes']:,} B"))
        forward = f"{format_count(found['instructions_forward'])} of them forward"
        lines.append(("instructions a step", f"{format_count(found['instructions_per_step'])}, {forward}"))
    equal = "equal to the bit on" if found["bit_equal"] else "DIFFERENT on"
    names = ", ".join(dict.fromkeys((target, "simulator", "host")))
    lines.append(("trained state", f"{found['state_sha256'][:16]}, {equal} {names}"))
    print()
    for title, text in lines:
        print(f"{title:<28}{text}")


def print_waterfall(steps: Sequence[Mapping[str, Any]]) -> None:
    """A row a pass, in bytes."""
    from rich.table import Table

    from efftrain.report.device import waterfall_table

    found = waterfall_table(steps)
    table = Table(box=None, pad_edge=False)
    for number, column in enumerate(found.columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    for row in found.rows:
        table.add_row(*row)
    print_table(table)


def with_timeline(found: Mapping[str, Any], program: Program) -> dict[str, Any]:
    """What is printed, and for the picture where the backward pass begins and the bytes alive during each op."""
    from efftrain.ondevice.memory import step_bytes

    return {
        **found,
        "num_forward_ops": program.graph.num_predict,
        "alive_bytes": step_bytes(program.graph, program.layers),
    }


def write_report(folder: Path, found: Mapping[str, Any], seed: int) -> Path:
    """Write ``plan.json`` and ``report.html`` into a folder, and return the path of the page.

    Raises:
        ConfigError: The folder cannot be written.
    """
    from efftrain.errors import ConfigError
    from efftrain.report.device import device_page
    from efftrain.report.page import write_page
    from efftrain.report.run import environment, write_atomic

    facts = {
        "command": shlex.join(["efftrain", *sys.argv[1:]]),
        "seed": str(seed),
        "rounding": str(found["rounding"]),
        **{name: str(version) for name, version in environment()["versions"].items()},
    }
    path = folder / "report.html"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "plan.json", json.dumps(found, indent=1) + "\n")
        write_page(device_page(found, facts), path)
    except OSError as error:
        raise ConfigError(f"--out: {folder} cannot be written ({error.strerror}); choose another folder.") from error
    return path

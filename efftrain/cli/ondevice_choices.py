"""What else ``efftrain ondevice plan`` could plan: other schemes, and the smallest board of each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from efftrain.cli.console import progress
from efftrain.cli.ondevice_compiler import Compiler
from efftrain.cli.ondevice_output import SchemeRow
from efftrain.errors import ConfigError

if TYPE_CHECKING:
    from efftrain.ondevice import Board, Program
    from efftrain.ondevice.memory import MemoryPlan

_COMPARED = ("last_layer", "bias_only", "sparse", "last_k=3", "full")


def compared(compiler: Compiler, asked: Program) -> list[SchemeRow]:
    """Plans of the usual schemes, of the published ones if they are for this model, and of the one asked for."""
    from efftrain.ondevice import Scheme
    from efftrain.ondevice.fitting import unlimited
    from efftrain.ondevice.scheme import PUBLISHED

    names = [*_COMPARED, *(PUBLISHED if compiler.request.model == "mcunet-5fps" else ())]
    with progress("planning other schemes") as advance:
        rows: list[SchemeRow] = [_row(compiler, asked)]
        for done, name in enumerate(names):
            advance(done, len(names), name)
            if name == compiler.scheme.name:
                continue
            try:
                program = compiler.compile(Scheme.parse(name), unlimited(compiler.board))
            except ConfigError:  # a scheme for more layers than this model has
                continue
            rows.append(_row(compiler, program))
        advance(len(names), len(names))
    return sorted(rows, key=lambda row: row[1].total_ram_bytes)


def _row(compiler: Compiler, program: Program) -> SchemeRow:
    from efftrain.ondevice.fitting import on_smallest_board

    def plan_for(board: Board) -> MemoryPlan:
        return compiler.compile(program.scheme, board, must_fit=False).plan

    return program.scheme.name, program.plan, on_smallest_board(program, compiler.request.lr, plan_for)


def scheme_dict(name: str, plan: MemoryPlan, smallest: tuple[Board, MemoryPlan] | None) -> dict[str, Any]:
    """A row of the table for JSON."""
    keys = ("total_ram_bytes", "arena_bytes", "trained_state_bytes", "flash_bytes", "macs_forward", "macs_backward")
    return {
        "scheme": name,
        **{key: getattr(plan, key) for key in keys},
        "smallest_board": None if smallest is None else smallest[0].name,
        "smallest_board_total_ram_bytes": None if smallest is None else smallest[1].total_ram_bytes,
    }

"""What else ``efftrain ondevice plan`` could plan: other schemes, and the smallest board of each."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from efftrain.cli.console import progress
from efftrain.cli.ondevice_compiler import UNLIMITED_BYTES, Compiler
from efftrain.cli.ondevice_output import SchemeRow
from efftrain.errors import ConfigError

if TYPE_CHECKING:
    from efftrain.ondevice import Board
    from efftrain.ondevice.memory import MemoryPlan

_COMPARED = ("last_layer", "bias_only", "sparse", "last_k=3", "full")


def compared(compiler: Compiler, asked: MemoryPlan) -> list[SchemeRow]:
    """Plans of the usual schemes, of the published ones if they are for this model, and of the one asked for."""
    from efftrain.ondevice import Scheme
    from efftrain.ondevice.scheme import PUBLISHED

    names = [*_COMPARED, *(PUBLISHED if compiler.request.model == "mcunet-5fps" else ())]
    rows: list[SchemeRow] = [(compiler.scheme.name, asked, _smallest_board(asked))]
    with progress("planning other schemes") as advance:
        for done, name in enumerate(names):
            advance(done, len(names), name)
            if name == compiler.scheme.name:
                continue
            try:
                plan = compiler.compile(Scheme.parse(name), _unlimited(compiler.board)).plan
            except ConfigError:  # a scheme for more layers than this model has
                continue
            rows.append((name, plan, _smallest_board(plan)))
        advance(len(names), len(names))
    return sorted(rows, key=lambda row: row[1].total_ram_bytes)


def _smallest_board(plan: MemoryPlan) -> str | None:
    from efftrain.ondevice import Board

    boards = sorted(map(Board.named, Board.names()), key=lambda board: (board.ram_bytes, board.flash_bytes, board.name))
    for board in boards:
        if plan.total_ram_bytes <= board.ram_bytes and plan.flash_bytes <= board.flash_bytes:
            return board.name
    return None


def scheme_dict(name: str, plan: MemoryPlan, board: str | None) -> dict[str, Any]:
    """A row of the table for JSON."""
    keys = ("total_ram_bytes", "arena_bytes", "trained_state_bytes", "flash_bytes", "macs_forward", "macs_backward")
    return {"scheme": name, **{key: getattr(plan, key) for key in keys}, "smallest_board": board}


def _unlimited(board: Board) -> Board:
    return replace(board, ram_bytes=UNLIMITED_BYTES, flash_bytes=UNLIMITED_BYTES)

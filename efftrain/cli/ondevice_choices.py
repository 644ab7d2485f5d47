"""What else ``efftrain ondevice plan`` could plan: other schemes, and the smallest board of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from efftrain.cli.console import progress
from efftrain.cli.ondevice_compiler import Compiler
from efftrain.cli.ondevice_output import SchemeRow
from efftrain.errors import BudgetError, ConfigError

if TYPE_CHECKING:
    from efftrain.ondevice import Board, Program
    from efftrain.ondevice.memory import MemoryPlan

_SMALLER: Mapping[str, Mapping[str, object]] = {
    "--input-in-place": {"input_in_place": True},
    "--rounding stochastic": {"rounding": "stochastic"},
    "--scheme last_layer": {"scheme": "last_layer"},
}
"""Options that make a program smaller, those that change least first."""
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


def refusal(compiler: Compiler) -> tuple[BudgetError, Program]:
    """Why what was asked for does not fit and what would, as options; and the program that does not fit."""
    from efftrain.ondevice.program import shortage

    program = compiler.compile(must_fit=False)
    found = shortage(program.plan, program.code.constant_bytes)
    assert found is not None, "a program that fits was refused"
    if program.plan.total_ram_bytes <= program.plan.board_ram_bytes:
        return BudgetError(f"{found} Choose a smaller model or a larger board."), program
    options = {option: change for option, change in _SMALLER.items() if not _is_so(compiler, program, change)}
    needs = {option: _needs(compiler, change) for option, change in options.items()}
    fitting = {option: needed for option, needed in needs.items() if needed <= program.plan.board_ram_bytes}
    if not fitting and len(options) > 1:
        together = _needs(compiler, {key: value for change in options.values() for key, value in change.items()})
        needs = {" ".join(options): together}
        fitting = needs if together <= program.plan.board_ram_bytes else {}
    if fitting:
        remedy = f"These fit: {_listed(fitting)}. Or choose a larger board"
    elif needs:
        remedy = f"Choose a smaller model or a larger board: {_listed(needs)} is too much as well"
    else:
        remedy = "Choose a smaller model or a larger board"
    return BudgetError(f"{found} {remedy}."), program


def _is_so(compiler: Compiler, program: Program, change: Mapping[str, object]) -> bool:
    """Whether an option was given already, or cannot make the program smaller."""
    return (
        ("rounding" in change and program.rounding == "stochastic")
        or ("input_in_place" in change and compiler.request.input_in_place)
        or ("scheme" in change and program.scheme.name in ("none", "last_layer"))
    )


def _needs(compiler: Compiler, change: Mapping[str, object]) -> int:
    return compiler.but(**change).compile(must_fit=False).plan.total_ram_bytes


def _listed(needs: Mapping[str, int]) -> str:
    return ", ".join(f"{option} ({needed} B)" for option, needed in needs.items())


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

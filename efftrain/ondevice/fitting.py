"""The smallest shipped board that can run a program.

A plan for much RAM does not tell: where RAM is short, the compiler takes gradients some channels at a time.
"""

from collections.abc import Callable
from dataclasses import replace

from efftrain.ondevice.autodiff import differentiate
from efftrain.ondevice.memory import MemoryPlan, step_bytes
from efftrain.ondevice.passes import run_passes
from efftrain.ondevice.program import Program
from efftrain.ondevice.quantize import quantize
from efftrain.ondevice.target import Board

UNLIMITED_BYTES = 1 << 40
"""Of RAM or flash: more than any board has."""


def unlimited(board: Board) -> Board:
    """The board with so much memory that everything fits and nothing is taken in tiles."""
    return replace(board, ram_bytes=UNLIMITED_BYTES, flash_bytes=UNLIMITED_BYTES)


def on_smallest_board(
    program: Program, learning_rate: float, plan_for: Callable[[Board], MemoryPlan]
) -> tuple[Board, MemoryPlan] | None:
    """The smallest shipped board that can run a program, and the plan there.

    Args:
        program: Compiled for any board.
        learning_rate: As given to ``compile``.
        plan_for: The same planned for another board, whether it fits there or not. Asked only where the program as it
            is does not fit and one with tiles may.

    Returns:
        ``None`` if no shipped board can run it.
    """
    boards = sorted(map(Board.named, Board.names()), key=lambda board: (board.ram_bytes, board.flash_bytes, board.name))
    least_bytes: int | None = None
    for board in boards:
        if _fits(program.plan, board):
            return board, program.plan
        if program.code.constant_bytes > board.flash_bytes:
            continue
        if least_bytes is None:
            least_bytes = _least_ram_bytes(program, learning_rate)
        if least_bytes <= board.ram_bytes and _fits(plan := plan_for(board), board):
            return board, plan
    return None


def _fits(plan: MemoryPlan, board: Board) -> bool:
    ram_bytes = plan.total_ram_bytes - plan.stack_bytes + board.stack_bytes
    return ram_bytes <= board.ram_bytes and plan.flash_bytes <= board.flash_bytes


def _least_ram_bytes(program: Program, learning_rate: float) -> int:
    """Trained state and the peak of the backward pass when every block is taken in the smallest tiles."""
    ranges = {name: number.scale * number.top for name, number in program.numbers.items()}
    quantized = quantize(program.float_graph, ranges, learning_rate, program.loss)
    step = replace(differentiate(quantized, program.trained, program.rounding), copies_input=program.graph.copies_input)
    graph = run_passes(step, quantized.layers, ("stream_rows",), arena_bytes=0)
    backward = step_bytes(graph, quantized.layers, range(graph.num_predict, len(graph.ops)))
    return program.layout.ram_bytes + max(backward, default=0)

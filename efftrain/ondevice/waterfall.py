"""What each pass contributes: plans of one training step, from no pass at all to the program as it was compiled.

Every row is a plan of its own: the passes up to it have run, and all buffers are placed again. Nothing is estimated,
and no C is written for the rows between.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from efftrain.ondevice.autodiff import differentiate
from efftrain.ondevice.ir import StepGraph
from efftrain.ondevice.memory import Arena, MemoryPlan, plan_arena, step_bytes
from efftrain.ondevice.passes import OVERLAP, PASSES, run_passes
from efftrain.ondevice.program import Program
from efftrain.ondevice.quantize import quantize


@dataclass(frozen=True, slots=True)
class WaterfallStep:
    """A plan after some of the passes.

    Attributes:
        name: The last pass that ran; ``none`` for the step as it was differentiated, ``moves`` for the whole program.
        num_ops: Of the step.
        max_live_forward_bytes: Most bytes that are alive during one op of the prediction. From the pass ``overlap`` on,
            less what an output may share with an input that dies with it.
        max_live_backward_bytes: The same for loss, gradients and updates; 0 if nothing is trained.
        arena_bytes: Placed.
        arena_lower_bound_bytes: No placement of these ops in this order is smaller.
        trained_state_bytes: Same in every row: no pass changes what is trained.
        total_ram_bytes: Arena, trained state, scratch, stack and static data.
    """

    name: str
    num_ops: int
    max_live_forward_bytes: int
    max_live_backward_bytes: int
    arena_bytes: int
    arena_lower_bound_bytes: int
    trained_state_bytes: int
    total_ram_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def waterfall(program: Program, learning_rate: float) -> tuple[WaterfallStep, ...]:
    """Plans from nothing to everything.

    Args:
        program: Compiled with every pass.
        learning_rate: As given to ``compile``.

    Returns:
        ``none``, each pass in the order in which they run, ``overlap`` and ``moves``. The last one is ``program.plan``.
    """
    ranges = {name: number.scale * number.top for name, number in program.numbers.items()}
    quantized = quantize(program.float_graph, ranges, learning_rate, program.loss)
    naive = replace(
        differentiate(quantized, program.trained, program.rounding), copies_input=program.graph.copies_input
    )
    layers, plan = quantized.layers, program.plan
    arena_bytes = program.target.ram_bytes - (plan.total_ram_bytes - plan.arena_bytes)
    rows: list[WaterfallStep] = []
    graph = naive
    for number, name in enumerate(("none", *PASSES)):
        graph = run_passes(naive, layers, tuple(PASSES)[number:], arena_bytes)
        arena = plan_arena(graph, layers, overlap=False)
        rows.append(_row(name, graph, step_bytes(graph, layers, overlap=False), arena, plan))
    shared = plan_arena(graph, layers)
    rows.append(_row(OVERLAP, graph, step_bytes(graph, layers), shared, plan))
    whole = Arena(plan.buffers, plan.arena_bytes, plan.arena_lower_bound_bytes)
    rows.append(_row("moves", program.graph, step_bytes(program.graph, layers), whole, plan))
    return tuple(rows)


def _row(name: str, graph: StepGraph, alive: Sequence[int], arena: Arena, plan: MemoryPlan) -> WaterfallStep:
    return WaterfallStep(
        name=name,
        num_ops=len(graph.ops),
        max_live_forward_bytes=max(alive[: graph.num_predict]),
        max_live_backward_bytes=max(alive[graph.num_predict :], default=0),
        arena_bytes=arena.num_bytes,
        arena_lower_bound_bytes=arena.lower_bound_bytes,
        trained_state_bytes=plan.trained_state_bytes,
        total_ram_bytes=plan.total_ram_bytes - plan.arena_bytes + arena.num_bytes,
    )

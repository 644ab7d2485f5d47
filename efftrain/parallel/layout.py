"""How a plan divides one model: found once, before the ranks meet."""

from dataclasses import dataclass

from efftrain.parallel.stages import StageCut
from efftrain.parallel.tensor import TensorPlan


@dataclass(frozen=True, eq=False)
class Layout:
    """Names, shapes and graphs; no weights, so it holds on any device."""

    tensor: TensorPlan | None = None
    """Of the tensor axis; ``None`` without one."""
    cuts: tuple[StageCut, ...] = ()
    """Stages of the pipeline; none without one."""

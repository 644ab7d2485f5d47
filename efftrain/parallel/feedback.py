"""Codec feedback in checkpoints of plans with several axes: whose it is, and who takes it on under another plan.

The rule: feedback belongs to a parameter, or to the part of it that a rank of the tensor axis holds. Another pipeline
axis deals the parameters out anew; another data axis shares the feedback out as ``compression.redistribute`` says;
another tensor axis, or other sharding, has other parts, and what was not sent yet is forgotten with a warning.
"""

# P, D, T: sizes of the pipeline, data and tensor axis

import warnings
from collections.abc import Mapping, Sequence

from torch import Tensor

from efftrain.errors import CheckpointError

AXES = "axes"
"""Name of a rank's axes among its feedback: int64 ``(P, D, T, S)`` with ``S`` ranks that share one copy of weights."""

States = Sequence[Mapping[str, Tensor]]


def of_replicas(states: States, *, tensor: int, place: int) -> list[dict[str, Tensor]] | None:
    """The feedback of each old replica, of all its stages together.

    Args:
        states: Of all old ranks, in their order.
        tensor: ``T`` of this run.
        place: This rank's number on its tensor axis.

    Returns:
        ``D`` of them, without ``AXES``; ``None`` if they do not fit this plan, which a warning says.

    Raises:
        CheckpointError: There are not as many as their axes say.
    """
    pipeline, data, old_tensor, shard = axes_of(states)
    if len(states) != pipeline * data * old_tensor:
        raise CheckpointError(
            f"the checkpoint has {len(states)} ranks, its axes {pipeline} x {data} x {old_tensor}; it is damaged"
        )
    if old_tensor != tensor or shard > 1:
        forget(states)
        return None
    found: list[dict[str, Tensor]] = []
    for replica in range(data):
        merged: dict[str, Tensor] = {}
        for stage in range(pipeline):
            merged.update(states[(stage * data + replica) * tensor + place])
        merged.pop(AXES, None)
        found.append(merged)
    return found


def axes_of(states: States) -> tuple[int, ...]:
    """``(P, D, T, S)`` of the plan that wrote these."""
    axes = states[0].get(AXES)
    return (1, len(states), 1, 1) if axes is None else tuple(int(size) for size in axes)


def forget(states: States) -> None:
    """Say that feedback is lost, if there is any."""
    if any("residual/" in name or "velocity/" in name for state in states for name in state):
        warnings.warn(
            "the codec's feedback in the checkpoint is of another tensor axis or sharding: what was not sent yet is "
            "forgotten, weights and optimizer go on exactly",
            stacklevel=3,
        )

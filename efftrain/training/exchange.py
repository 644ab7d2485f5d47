"""What a training step needs from the other ranks, whoever provides it."""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup


class Line(Protocol):
    """What writing a checkpoint together needs from the other ranks."""

    rank: int
    world_size: int

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value added up over all ranks. Every rank calls it with as many values; also a barrier."""


@dataclass(frozen=True)
class Agreement:
    """What all ranks know of a step once they have asked each other; equal on all of them."""

    healthy: bool
    """Gradient and loss of every rank are finite."""
    loss: float
    """Mean over the replicas; meant for healthy steps."""
    grad_norm: Tensor
    """Euclidean norm of the whole averaged gradient, a scalar."""


class Exchange(Line, Protocol):
    """The one door between a training step and the other ranks.

    ``SingleProcess`` is the empty one; ``efftrain.parallel`` has those that talk.
    """

    replica: int
    """Which copy of the model this rank belongs to; each copy takes its share of the batch."""
    num_replicas: int
    axes: str
    """Sizes of the axes that the ranks are laid out in, e.g. ``pipeline=1 data=2 tensor=2``."""
    is_divided: bool
    """Whether ranks hold different parts of the model, so that all of them have to write a checkpoint."""
    is_entrywise: bool
    """Set by the job: nothing is clipped, and the optimizer moves no weight whose gradient is zero (plain SGD). So a
    mean with few entries may be kept for ``descend``."""

    def wrap(self, model: nn.Module) -> nn.Module:
        """Make the backward pass of ``model`` leave the average gradient of all ranks in ``.grad``."""

    def local_only(self) -> AbstractContextManager[None]:
        """Inside, gradients are summed up locally and nothing is sent: micro-batches but the last."""

    def second_line(self) -> "tuple[Line, ProcessGroup | None] | None":
        """Another way to the same ranks, that a thread of its own may use; every rank calls it.

        Returns:
            It, and its process group if it has one; ``None`` if there is no second way.
        """

    def sync_buffers(self, model: nn.Module) -> None:
        """Give every rank the buffers of rank 0, e.g. running statistics: each rank's come from its own samples."""

    def check_replicas(self, model: nn.Module) -> None:
        """Compare the weights of all ranks, bit for bit. Every rank calls it after the same step.

        Raises:
            ReplicaError: They differ; on all ranks.
        """

    def finish(self) -> bool:
        """After the backward pass: wait until ``.grad`` holds the average.

        Returns:
            False if some rank, this one or one that told it, had to send something else than its gradient, because
            that held inf or NaN.
        """

    def agree(self, model: nn.Module, loss: Tensor, *, took_part: bool) -> Agreement:
        """Ask all ranks once how the step was. Every rank calls it, in every step.

        A step that one rank alone skips, or clips otherwise, drives replicas apart for good, and loss and norm are not
        known to be finite anywhere but where they were computed; so the question is asked also where nothing is clipped
        or logged.

        Args:
            model: What this rank trains.
            loss: Of this rank, a scalar; 0 on the ranks of a replica but one.
            took_part: What ``finish`` returned.
        """

    @property
    def lacks_gradients(self) -> bool:
        """After ``finish``: some parameter got no gradient on this rank; beside those of others it is zero."""

    def leave_out(self) -> None:
        """Parameters that have a gradient on no rank get none, and owe what they owed before the step.

        So the optimizer leaves them alone, as on one process. All ranks call it, before ``settle``, if any of them
        ``lacks_gradients``.
        """

    def settle(self, ok: bool) -> None:
        """The step counts (``ok``) or all ranks skip it: keep or forget what feedback staged."""

    def descend(self, lr: float) -> None:
        """Move the weights whose mean is not in ``.grad``, where the optimizer finds it, by ``-lr`` times the mean.

        Called in steps that count, behind ``settle``. A mean is kept only where ``is_entrywise``.
        """

    def residual_norm(self) -> float:
        """Euclidean norm of what feedback keeps on this rank for later steps."""

    def stats(self) -> dict[str, float]:
        """Figures of the last step on this rank, e.g. ``wire_bytes``. Empty if nothing is sent."""

    def state_dict(self) -> dict[str, Tensor]:
        """What this rank alone must remember (feedback), for its part of a checkpoint."""

    def load_state_dicts(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Restore from the parts of all ranks that wrote the checkpoint, in rank order."""


def local_grad_norm(model: nn.Module) -> Tensor:
    """Euclidean norm of the gradients that this rank holds, a scalar."""
    return torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])


class SingleProcess:
    """No other ranks."""

    rank = replica = 0
    world_size = num_replicas = 1
    axes = "pipeline=1 data=1 tensor=1"
    is_divided = is_entrywise = lacks_gradients = False

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model itself."""
        return model

    def local_only(self) -> AbstractContextManager[None]:
        """Nothing to suppress."""
        return nullcontext()

    def sum(self, values: Sequence[float]) -> list[float]:
        """The values themselves."""
        return list(values)

    def second_line(self) -> tuple[Line, None]:
        """Itself."""
        return self, None

    def sync_buffers(self, model: nn.Module) -> None:
        """There is only rank 0."""

    def check_replicas(self, model: nn.Module) -> None:
        """There is only one."""

    def finish(self) -> bool:
        """Nothing to wait for."""
        return True

    def agree(self, model: nn.Module, loss: Tensor, *, took_part: bool) -> Agreement:
        """There is nobody to ask."""
        norm, mean = local_grad_norm(model), float(loss)
        return Agreement(took_part and math.isfinite(mean) and bool(torch.isfinite(norm)), mean, norm)

    def leave_out(self) -> None:
        """Autograd has left them out."""

    def settle(self, ok: bool) -> None:
        """Nothing is staged."""

    def descend(self, lr: float) -> None:
        """All gradients are in ``.grad``."""

    def residual_norm(self) -> float:
        """Nothing is kept."""
        return 0.0

    def stats(self) -> dict[str, float]:
        """Nothing is sent."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing to remember."""
        return {}

    def load_state_dicts(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Feedback of a compressed run, if the checkpoint has any, is not needed by an uncompressed one."""

"""The pipeline axis: stages of a model on ranks of their own, driven by torch's schedules.

Gradients of all micro-batches add up in ``.grad`` first; the data axis exchanges them when the schedule is through, so
it is right with every schedule, also those that compute the gradients of inputs and weights at different times.
"""

# P ranks of the pipeline axis, S stages, M micro-batches

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, TypeAlias, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from efftrain.errors import ConfigError
from efftrain.parallel.stages import StageCut
from efftrain.training import Exchange

Schedule: TypeAlias = Literal["gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv", "dualpipev"]

_SCHEDULES: Mapping[str, type[Any]] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved_1f1b": ScheduleInterleaved1F1B,
    "interleaved_zero_bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
    "dualpipev": ScheduleDualPipeV,
}
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
SPLIT_BACKWARD = ("interleaved_zero_bubble", "zbv", "dualpipev")
"""Schedules that compute gradients of inputs first and those of weights later."""


def stages_a_rank(schedule: str) -> int:
    """One, or two where a schedule interleaves."""
    return 1 if schedule in ("gpipe", "1f1b") else 2


def stages_of(rank: int, size: int, schedule: str) -> tuple[int, ...]:
    """The stages that a rank of the pipeline axis holds.

    Args:
        rank: On the pipeline axis.
        size: ``P``.
        schedule: One of ``SCHEDULES``. Those in the shape of a V give rank 0 the first and the last stage.
    """
    if stages_a_rank(schedule) == 1:
        return (rank,)
    return (rank, 2 * size - 1 - rank) if schedule in ("zbv", "dualpipev") else (rank, rank + size)


def holders(stages: Collection[int], size: int, schedule: str) -> list[int]:
    """The ranks of the pipeline axis that hold any of some stages."""
    return [rank for rank in range(size) if not set(stages).isdisjoint(stages_of(rank, size, schedule))]


def check_micro_batches(schedule: str, size: int, num: int) -> None:
    """Refuse a number that a schedule cannot run.

    Raises:
        ConfigError: With one that it can.
    """
    if num < 1:
        raise ConfigError(f"parallel.microbatches is {num}, expected at least 1")
    if schedule in ("interleaved_1f1b", "interleaved_zero_bubble") and num % max(1, num // size):
        raise ConfigError(
            f"schedule {schedule} runs rounds of {size} micro-batches or a little more: parallel.microbatches={num} "
            f"cannot be cut into {num // size} equal rounds; take {num // size * size}"
        )
    if schedule == "dualpipev" and num < 2 * size:
        raise ConfigError(
            f"schedule dualpipev needs a micro-batch for each of its {2 * size} stages, found "
            f"parallel.microbatches={num}; take {2 * size}"
        )


class Pipeline:
    """Forward and backward passes of this rank's stages; a ``Compute`` of the training step.

    Args:
        part: What this rank holds of the model.
        stages: Its stages by number, as they are called: divided and sharded already.
        cuts: All stages, for the shapes between them.
        group: The pipeline axis.
        schedule: One of ``SCHEDULES``.
        num_micro_batches: ``M``.
        objective: ``(output, targets) -> mean loss``.
        exchange: Waits until the schedule is through.
        device: Of this rank.
        num_parts: Ranks that divide the positions of what travels between stages.
        bf16: Run under autocast.
        around: Context of forward and backward passes.
        whole: Makes whole logits of what the last stage gives.
        counts: Whether the loss of this rank counts; one rank of a replica's last stage does.
    """

    def __init__(
        self,
        part: nn.Module,
        stages: Mapping[int, nn.Module],
        cuts: Sequence[StageCut],
        group: dist.ProcessGroup,
        *,
        schedule: str,
        num_micro_batches: int,
        objective: Callable[[Tensor, Tensor], Tensor],
        exchange: Exchange,
        device: torch.device,
        num_parts: int,
        bf16: bool,
        around: Callable[[], AbstractContextManager[object]],
        whole: Callable[[Tensor], Tensor],
        counts: bool,
    ) -> None:
        self.model = part
        self._stages, self._cuts, self._group, self._schedule_name = dict(stages), cuts, group, schedule
        self._exchange, self._device, self._num_parts = exchange, device, num_parts
        self._num_micro_batches, self._bf16 = num_micro_batches, bf16
        self._around, self._whole, self._counts = around, whole, counts
        self._first, self._last = 0 in self._stages, len(cuts) - 1 in self._stages
        made = [self._torch_stage(number, module) for number, module in self._stages.items()]
        kind = _SCHEDULES[schedule]
        only = made[0] if stages_a_rank(schedule) == 1 else made
        # torch would scale gradients stage by stage, and twice those of a parameter that two stages of a rank use.
        self._schedule = kind(
            only,
            n_microbatches=num_micro_batches,
            loss_fn=lambda output, targets: objective(output, targets) / num_micro_batches,
            scale_grads=False,
        )

    def backward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """See ``Compute``."""
        expected = self._num_micro_batches * self._cuts[0].input_shape[0]
        if len(inputs) != expected:
            raise ConfigError(
                f"a replica's share of the batch is {len(inputs)} samples, the pipeline was made for {expected}; apply "
                "the plan to an example of the size that the batches have"
            )
        self.model.train()
        losses: list[Tensor] = []
        given = (inputs.to(self._device),) if self._first else ()
        wanted = targets.to(self._device) if self._last else None
        with self._exchange.local_only(), self._around(), self._autocast():
            self._schedule.step(*given, target=wanted, losses=losses, return_outputs=False)
        if not self._last or not self._counts:
            return torch.zeros((), device=self._device)
        return torch.stack([loss.detach() for loss in losses]).sum()

    @torch.no_grad()
    def logits(self, inputs: Tensor) -> Tensor | None:
        """See ``Compute``: one stage after the other, without micro-batches."""
        self.model.eval()
        value, result = inputs.to(self._device), None
        with self._autocast():
            for number, cut in enumerate(self._cuts):
                owner, before = self._owner(number), self._owner(number - 1) if number else None
                if number in self._stages:
                    if before is not None and before != dist.get_rank(self._group):
                        shape = self._local_shape(cut.input_shape, len(inputs))
                        value = torch.empty(shape, dtype=cut.input_dtype, device=self._device)
                        dist.recv(value, group=self._group, group_src=before)
                    value = self._stages[number](value)
                    if number == len(self._cuts) - 1:
                        result = self._whole(value)
                    elif self._owner(number + 1) != owner:
                        dist.send(value.contiguous(), group=self._group, group_dst=self._owner(number + 1))
        return result if self._counts else None

    def _torch_stage(self, number: int, module: nn.Module) -> PipelineStage:
        cut = self._cuts[number]
        size = cut.input_shape[0]
        given = self._local_shape(cut.input_shape, size) if number else cut.input_shape
        before = torch.empty(given, dtype=cut.input_dtype, device="meta")
        after = torch.empty(self._local_shape(cut.output_shape, size), dtype=cut.output_dtype, device="meta")
        before.requires_grad_(number > 0)
        after.requires_grad_(True)
        return PipelineStage(
            module, number, len(self._cuts), self._device, input_args=before, output_args=after, group=self._group
        )

    def _local_shape(self, shape: Sequence[int], batch: int) -> tuple[int, ...]:
        """What one rank of the tensor axis sends: all of it, or its part of the positions."""
        rest = [shape[1] // self._num_parts, *shape[2:]] if len(shape) > 1 else []
        return (batch, *rest)

    def _owner(self, stage: int) -> int:
        size = dist.get_world_size(self._group)
        return next(rank for rank in range(size) if stage in stages_of(rank, size, self._schedule_name))

    @contextlib.contextmanager
    def _autocast(self) -> Iterator[None]:
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
            yield

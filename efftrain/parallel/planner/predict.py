"""Memory and step time of a plan, before it runs.

A prediction is played through, not fitted: operators by their arithmetic and memory traffic (``work``), buckets by the
messages that our exchange really makes (``exchange``), pipelines by the idle time of their schedule (``schedules``).
All of a cluster that goes into it is in one small file (``hardware``).
"""

# N ranks in all: D data x T tensor x P pipeline; M micro-batches

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from efftrain.compression import Identity
from efftrain.compression.sparsify import Sparse
from efftrain.errors import ConfigError
from efftrain.parallel.pipeline import SPLIT_BACKWARD, stages_a_rank, stages_of
from efftrain.parallel.plan import Plan
from efftrain.parallel.planner.exchange import Exchange, feedback_bytes, replicated, sharded
from efftrain.parallel.planner.hardware import Hardware
from efftrain.parallel.planner.plans import Refusal, describe
from efftrain.parallel.planner.schedules import bubble, in_flight
from efftrain.parallel.planner.setting import Setting
from efftrain.parallel.planner.work import Work, measure_work, ready_times, seconds
from efftrain.parallel.recompute import blocks_of
from efftrain.parallel.stages import StageCut
from efftrain.parallel.sync import SPARSE_SHARE

_GIB = 1 << 30
_LARGE = 1 << 20
"""As in sharded.py."""
_ASKED_BYTES = 32
"""Of a rank's message in ``Exchange.agree``."""


@dataclass(frozen=True)
class MemoryParts:
    """Bytes of a rank when most is in use, without what Python and torch take themselves."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    feedback: int
    buffers: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class TimeParts:
    """Seconds of one update."""

    compute: float
    """Forward and backward passes of the busiest rank."""
    bubble: float
    """In which a rank of a pipeline has nothing to do, or no core to do it on."""
    tensor: float
    """Adding up over the tensor axis, and what divided operators take longer."""
    exchange: float
    """Waiting for the data axis."""
    codec: float
    update: float
    """Optimizer, gradient norm, and what every step has."""

    @property
    def total(self) -> float:
        """All of it."""
        return float(sum(asdict(self).values()))


@dataclass(frozen=True)
class Prediction:
    """A plan that can run."""

    plan: Plan
    memory: MemoryParts
    time: TimeParts
    wire_bytes: float
    """That a rank sends over the data axis in an update."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            **describe(self.plan),
            "step_s": self.time.total,
            "memory_bytes": self.memory.total,
            "wire_bytes": self.wire_bytes,
            "time": asdict(self.time),
            "memory": asdict(self.memory),
        }


class Planner:
    """Predicts plans of one setting on one cluster. Parts of the model that plans share are looked at once.

    Args:
        setting: What is to be trained.
        hardware: Where.
    """

    def __init__(self, setting: Setting, hardware: Hardware) -> None:
        self.setting, self.hardware = setting, hardware
        self._works: dict[tuple[Any, ...], list[Work] | ConfigError] = {}
        self._styles: dict[int, dict[str, str] | ConfigError] = {}

    def rank(self, world_size: int, plans: Sequence[Plan | Refusal]) -> tuple[list[Prediction], list[Refusal]]:
        """Predict plans; the fastest first, and those that cannot run."""
        found, refused = [], []
        for plan in plans:
            if isinstance(plan, Refusal):
                refused.append(plan)
                continue
            try:
                found.append(self.predict(plan, world_size))
            except ConfigError as error:
                refused.append(Refusal(describe(plan), str(error)))
        return sorted(found, key=lambda prediction: prediction.time.total), refused

    def predict(self, plan: Plan, world_size: int) -> Prediction:
        """Memory and time of one plan.

        Raises:
            ConfigError: It does not fit the processes, the model, the batch or the memory of a rank.
        """
        plan.check(world_size)
        plan = replace(plan, data=plan.replicas(world_size))
        works = self._works_of(plan)
        slowdown = self.hardware.slowdown(world_size)
        exchanges = [self._exchange(plan, work, world_size, slowdown) for work in works]
        memory = max(
            (
                self._memory(plan, rank, work, exchange)
                for rank, (work, exchange) in enumerate(zip(works, exchanges, strict=True))
            ),
            key=lambda parts: parts.total,
        )
        if memory.total > self.hardware.memory_gib * _GIB:
            raise ConfigError(
                f"needs {memory.total / _GIB:.1f} GiB a rank, {self.hardware.name} has {self.hardware.memory_gib:g}; "
                "more ranks on the tensor or pipeline axis, more micro-batches, shard=full and checkpointing=full need "
                "less"
            )
        times = self._time(plan, works, exchanges, world_size, slowdown)
        return Prediction(plan, memory, times, max(exchange.wire_bytes for exchange in exchanges))

    # Time ---------------------------------------------------------------------------------------------------------

    def _time(
        self, plan: Plan, works: Sequence[Work], exchanges: Sequence[Exchange], world_size: int, slowdown: float
    ) -> TimeParts:
        hardware, pieces = self.hardware, self._num_pieces(plan)
        in_turn = 1.0
        if plan.pipeline > 1:  # a rank that idles leaves its core to others
            in_turn = hardware.ranks_a_core(world_size)
            slowdown /= in_turn
        passes = [self._passes(plan, work, slowdown) for work in works]
        forward, backward, tensor = max(passes, key=sum)
        idle = 0.0
        if plan.pipeline > 1:
            idle = bubble(plan.schedule, plan.pipeline, forward, backward, tensor)
            link = hardware.link(plan.pipeline * self._data(plan) * plan.tensor)
            hops = 2 * stages_a_rank(plan.schedule) * (pieces + plan.pipeline - 1)
            idle += hops * link.seconds(max(work.output_bytes for work in works))
            busy = [sum(some) for some in passes]
            idle = max(idle, pieces * (in_turn * sum(busy) / len(busy) - max(busy)))
            slowdown *= in_turn
        longest = max(exchanges, key=lambda exchange: exchange.exposed_s + exchange.codec_s)
        divisor = self._shard_size(plan)
        update = max(self._update_s(plan, work, divisor) for work in works) * slowdown
        update += hardware.step_overhead_ms / 1e3 * slowdown
        if world_size > 1:  # every step asks all ranks whether they are well
            waits = hardware.link(world_size).seconds(_ASKED_BYTES, world_size - 1)
            update += waits + hardware.collective_us / 1e6 * slowdown
        return TimeParts(
            compute=pieces * (forward + backward),
            bubble=idle,
            tensor=pieces * tensor,
            exchange=longest.exposed_s,
            codec=longest.codec_s,
            update=update,
        )

    def _passes(self, plan: Plan, work: Work, slowdown: float) -> tuple[float, float, float]:
        """Forward, backward and the tensor axis, of one micro-batch on one rank."""
        hardware = self.hardware
        forward, backward = (
            seconds(part, hardware, bf16=self.setting.bf16) * slowdown for part in (work.forward, work.backward)
        )
        if plan.pipeline > 1:
            handover = hardware.handover_us / 1e6 * stages_a_rank(plan.schedule) * slowdown / 2
            forward, backward = forward + handover, backward + handover
        if plan.schedule in SPLIT_BACKWARD and plan.pipeline > 1:
            backward += len(work.backward) * hardware.split_operator_us / 1e6 * slowdown
        tensor = 0.0
        if plan.tensor > 1:
            link, others = hardware.link(plan.tensor), plan.tensor - 1
            for size in work.reduced_bytes:
                sent = 2 * others / plan.tensor * size
                tensor += link.seconds(sent, 2 * others) + sent * link.cpu_ns_per_byte / 1e9 * slowdown
            # Forward, and about twice as many backward.
            tensor += 3 * work.divided_operators * hardware.divided_operator_us / 1e6 * slowdown
        return forward, backward, tensor

    def _exchange(self, plan: Plan, work: Work, world_size: int, slowdown: float) -> Exchange:
        hardware, data = self.hardware, self._data(plan)
        link = hardware.link(data * plan.tensor)
        forward, backward, _ = self._passes(plan, work, slowdown)
        if plan.shard != "none":
            return sharded(
                work.num_parameters,
                (forward + backward) * self._num_pieces(plan),
                num_units=_num_units(work),
                gathers=2 if plan.shard == "full" else 1,
                codec=plan.codec,
                world_size=self._shard_size(plan),
                copies=data // self._shard_size(plan),
                hardware=hardware,
                slowdown=slowdown,
                link=hardware.link(self._shard_size(plan) * plan.tensor),
                between=link,
            )
        ready, end = ready_times(work, hardware, bf16=self.setting.bf16)
        scale = backward / end if end else 0.0
        if plan.pipeline > 1:  # gradients are exchanged when the schedule is through
            ready, backward, scale = dict.fromkeys(ready, 0.0), 0.0, 1.0
        return replicated(
            work.parameters,
            {name: at * scale for name, at in ready.items()},
            backward,
            codec=plan.codec,
            # Ranks of the tensor axis are neighbors, so a node has so many fewer of the data axis.
            sync=replace(plan.sync, node_size=max(1, plan.sync.node_size // plan.tensor)),
            by_ddp=_by_ddp(plan),
            world_size=data,
            hardware=hardware,
            slowdown=slowdown,
            link=link,
            inside=hardware.link(plan.sync.node_size),
        )

    def _update_s(self, plan: Plan, work: Work, divisor: int) -> float:
        """The optimizer reads and writes weights, gradients and its state; the norm reads the gradients once more."""
        passes = 8 if self.setting.optimizer.name == "adamw" else 6 if self._momentum(plan) else 4
        passes = 0 if self._stays_sparse(plan) else passes
        num, tensors = work.num_parameters / divisor, len(work.parameters)
        calls = 12.0 if self.setting.optimizer.name == "adamw" else 5.0
        # On a GPU torch updates tensors some dozens at a time.
        calls *= tensors if self.hardware.cores else 1 + tensors / 50
        return 4 * num * passes / (self.hardware.memory_gb_s * 1e9) + calls * self.hardware.operator_us / 1e6

    # Memory -------------------------------------------------------------------------------------------------------

    def _memory(self, plan: Plan, rank: int, work: Work, exchange: Exchange) -> MemoryParts:
        num, divisor = work.num_parameters, self._shard_size(plan)
        gradients, weights, activations = 4 * num, work.weight_bytes, work.later_peak_bytes
        buffers = exchange.buffer_bytes
        if plan.pipeline > 1:
            others = in_flight(plan.schedule, plan.pipeline, plan.num_micro_batches, rank)
            others -= 1 / stages_a_rank(plan.schedule)  # whose peak it is
            activations += int(others * work.saved_bytes) + plan.num_micro_batches * work.handed_bytes
        elif divisor == 1 and self.setting.micro_batches == 1 and not (_by_ddp(plan) and self._data(plan) > 1):
            # Gradients come while activations go: both are never there as a whole. DDP's have their place all the time.
            activations = max(0, work.first_peak_bytes - gradients)
        if plan.shard != "none":
            share, unit = 4 * -(-num // divisor), buffers
            # With whole weights most is in use between the passes, when there are no gradients but the first layer's;
            # else at the end, when all shards of gradients are there. The buffer is a layer's gradient on its way.
            weights, gradients = (share + unit, share + unit) if plan.shard == "full" else (share + 4 * num, unit)
        states = {"adamw": 2}.get(self.setting.optimizer.name, 1 if self._momentum(plan) else 0)
        corrected = plan.momentum_correction and self._data(plan) > 1
        return MemoryParts(
            weights=weights,
            gradients=gradients,
            optimizer=states * 4 * num // divisor,
            activations=activations,
            feedback=feedback_bytes(plan.codec, num, momentum=corrected) if self._data(plan) > 1 else 0,
            buffers=buffers,
        )

    # Parts of the model -------------------------------------------------------------------------------------------

    def _works_of(self, plan: Plan) -> list[Work]:
        """Of each rank of the pipeline axis."""
        setting, data, pieces = self.setting, self._data(plan), self._num_pieces(plan)
        if setting.batch_size % (data * pieces):
            raise ConfigError(
                f"loop.batch_size is {setting.batch_size}, expected a multiple of {data * pieces}: {data} replicas x "
                f"{pieces} micro-batches"
            )
        size = setting.batch_size // (data * pieces)
        # Schedules that give a rank the same stages share them.
        own = stages_of(0, plan.pipeline, plan.schedule)
        key = (
            plan.tensor,
            plan.pipeline,
            own,
            size,
            plan.checkpointing,
            plan.sequence,
            tuple(sorted(plan.tensor_styles.items())),
        )
        if key not in self._works:
            try:
                self._works[key] = self._look(plan, size)
            except ConfigError as error:
                self._works[key] = error
        found = self._works[key]
        if isinstance(found, ConfigError):
            raise found
        return found

    def _look(self, plan: Plan, size: int) -> list[Work]:
        setting = self.setting
        inputs = setting.sample.expand(size * plan.num_micro_batches, *setting.sample.shape[1:])
        layout = plan.lay_out(setting.model, inputs, bf16=setting.bf16)
        inputs = inputs[:size]
        styles = {} if layout.tensor is None else layout.tensor.styles
        more: dict[str, Any] = {"styles": styles, "size": plan.tensor, "bf16": setting.bf16}
        more["checkpointing"] = plan.checkpointing
        if plan.pipeline == 1:
            return [measure_work(setting.model, inputs, **more)]
        parts = []
        for number, cut in enumerate(layout.cuts):
            given = (
                inputs if number == 0 else setting.sample.new_zeros(1, dtype=cut.input_dtype).expand(cut.input_shape)
            )
            last, blocks = number == plan.num_stages - 1, blocks_of(setting.model, cut)
            part = measure_work(cut.build(setting.model), given, with_loss=last, blocks=blocks, **more)
            # What came from another rank is in its buffer already.
            received = cut.input_bytes if number else 0
            parts.append(replace(part, saved_bytes=max(0, part.saved_bytes - received)))
        own = [stages_of(rank, plan.pipeline, plan.schedule) for rank in range(plan.pipeline)]
        return [_joined([parts[i] for i in numbers], _handed_bytes(layout.cuts, numbers)) for numbers in own]

    def _num_pieces(self, plan: Plan) -> int:
        return plan.num_micro_batches if plan.pipeline > 1 else self.setting.micro_batches

    def _data(self, plan: Plan) -> int:
        assert plan.data is not None, "set by predict"
        return plan.data

    def _shard_size(self, plan: Plan) -> int:
        return 1 if plan.shard == "none" else plan.shard_size or self._data(plan)

    def _momentum(self, plan: Plan) -> bool:
        """Whether the optimizer keeps a velocity; the codec's feedback does with momentum correction."""
        optimizer = self.setting.optimizer
        corrected = plan.momentum_correction and plan.codec.combine != "sum" and self._data(plan) > 1
        return optimizer.name == "sgd" and optimizer.momentum > 0 and not corrected

    def _stays_sparse(self, plan: Plan) -> bool:
        """Whether the mean of gradients is added to the weights where it has entries, see ``GradSync``."""
        setting, data, codec = self.setting, self._data(plan), plan.codec
        optimizer = setting.optimizer if self._momentum(plan) else replace(setting.optimizer, momentum=0.0)
        plain_sgd = optimizer.is_entrywise
        gathered = (
            plan.sync.algorithm in ("auto", "gather")
            and plan.sync.node_size == 1
            and not plan.sync.whole_buckets
            and not plan.is_divided
            and data > 1
        )
        if not (isinstance(codec, Sparse) and plain_sgd and gathered) or setting.clips or not self.hardware.cores:
            return False
        return SPARSE_SHARE * data * codec.most_sent(1 << 20) <= 1 << 20


def _by_ddp(plan: Plan) -> bool:
    plain = isinstance(plan.codec, Identity) and plan.backend == "torch" and not plan.is_divided
    return plan.exchange == "ddp" or (plan.exchange == "auto" and plain)


def _num_units(work: Work) -> int:
    """Layers that ``Sharded`` gathers on their own: blocks of a stack, large layers, and the rest."""
    sizes: dict[tuple[str, ...], int] = defaultdict(int)
    blocks = set()
    for parameter in work.parameters:
        path = tuple(parameter.name.split("."))
        if len(path) > 2:
            sizes[path[:2]] += parameter.size
        if len(path) > 3:
            blocks.add(path[:2])
    return 1 + sum(path in blocks or size >= _LARGE for path, size in sizes.items())


def _handed_bytes(cuts: Sequence[StageCut], own: Collection[int]) -> int:
    """See ``Work``. Schedules of several stages a rank wait at the end of a step for what they sent, and keep it."""
    total, ways = 0, 1 if len(own) == 1 else 2
    for number in own:
        if number and number - 1 not in own:
            total += ways * cuts[number].input_bytes
        if number == len(cuts) - 1:
            total += cuts[number].output_bytes
        elif number + 1 not in own:
            total += ways * cuts[number].output_bytes
    return total


def _joined(works: Sequence[Work], handed_bytes: int) -> Work:
    """The stages of one rank as one part."""
    return Work(
        forward=tuple(operation for work in works for operation in work.forward),
        backward=tuple(operation for work in reversed(works) for operation in work.backward),
        parameters=tuple(parameter for work in works for parameter in work.parameters),
        weight_bytes=sum(work.weight_bytes for work in works),
        saved_bytes=sum(work.saved_bytes for work in works),
        first_peak_bytes=max(work.first_peak_bytes for work in works),
        later_peak_bytes=max(work.later_peak_bytes for work in works),
        reduced_bytes=tuple(size for work in works for size in work.reduced_bytes),
        divided_operators=sum(work.divided_operators for work in works),
        output_bytes=max(work.output_bytes for work in works),
        handed_bytes=handed_bytes,
    )

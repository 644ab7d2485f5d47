"""Measures in a few seconds what the planner needs to know of this machine, and of the links between ranks.

Alone, a process measures arithmetic, memory, codecs and the model. Started by a launcher, the ranks also measure the
links between them and how much slower they are together; and they take a few steps of small probes under each axis.
What an axis costs besides arithmetic and bytes (Python, torch's own calls) is what makes the planner right on a probe.
"""

import copy
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from efftrain.compression import Codec, Identity, Int8, LowRank, TopK
from efftrain.models import build_model
from efftrain.parallel.backends import Transport
from efftrain.parallel.plan import Plan
from efftrain.parallel.planner.hardware import CodecSpeed, Hardware
from efftrain.parallel.planner.predict import Planner
from efftrain.parallel.planner.setting import Setting
from efftrain.parallel.replicas import sum_numbers
from efftrain.parallel.sync import GradSync, SyncConfig
from efftrain.training import Job, OptimizerConfig, StepConfig

_SLICE_S = 0.1
_CODECS: dict[str, Codec] = {"Identity": Identity(), "Int8": Int8(), "TopK": TopK(0.01), "LowRank": LowRank(2)}
_MANY, _LARGE = (32, (16, 16)), (1, (1024, 512))
"""Tensors of a gradient, and their shape: what each costs, and what each element."""
_MESSAGE = 1 << 20
_PROBE: dict[str, Any] = {"width": 32, "depth": 2, "heads": 2, "context": 16, "tied": False}


def calibrate(base: Hardware, setting: Setting, transport: Transport | None = None) -> Hardware:
    """Figures of this machine, and how the setting's model runs on it. See ``Calibration``."""
    calibration = Calibration(base, setting, transport)
    calibration.measure()
    return calibration.hardware()


class Calibration:
    """What was measured, so often as ``measure`` was called.

    Measured in turns with something else, noise hurts both alike; the medians count.

    Args:
        base: What is not measured stays as it is: cores, ranks of a machine, memory of a rank; without a launcher also
            links and what axes cost.
        setting: Its model makes a few updates.
        transport: All ranks, if a launcher started some. Every rank makes the same calls.
    """

    def __init__(self, base: Hardware, setting: Setting, transport: Transport | None = None) -> None:
        self._base = base
        self._ranks = transport if transport is not None and transport.world_size > 1 else None
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._found: dict[str, list[float]] = defaultdict(list)
        self._models = {"model": _Model(setting, self._device)}
        self._axes: list[Axis] = []
        if self._ranks is not None:
            probe = _probe(self._ranks.world_size)
            self._models["probe"] = _Model(probe, self._device)
            self._axes = _axes(probe, self._ranks)

    def measure(self) -> None:
        """All of it once; some seconds."""
        if self._ranks is None or self._ranks.rank == 0:
            self._machine()
        self._together()
        if self._ranks is not None:
            self._link(self._ranks)
            for axis in self._axes:
                self._note(axis.cost, axis.step_s(self._ranks))

    def hardware(self) -> Hardware:
        """The medians as figures of a cluster; the same on all ranks but for what rank 0 alone measured."""
        found = {name: median(values) for name, values in self._found.items()}
        base = self._base
        if "gflops" not in found:
            return base  # rank 0 knows
        codecs = {
            name: CodecSpeed(
                **{unit: found[f"{name} {unit}"] for unit in ("encode_ns", "decode_ns", "encode_us", "decode_us")}
            )
            for name in _CODECS
        }
        plain = ("gflops", "gflops_bf16", "memory_gb_s", "operator_us")
        hardware = replace(
            _with(base, {name: found[name] for name in plain}),
            name=f"{base.name.removesuffix(', calibrated')}, calibrated",
            crowding=max(1.0, found.get("crowding", base.crowding)),
            codecs={**base.codecs, **codecs},
        )
        if self._ranks is not None:
            link = replace(
                base.link(self._ranks.world_size),
                latency_us=found["latency_us"],
                gbit_s=found["gbit_s"],
                cpu_ns_per_byte=found["cpu_ns_per_byte"] if base.cores else 0.0,
            )
            if self._ranks.world_size <= base.ranks_per_node:
                hardware = replace(hardware, inside=link)
            else:
                hardware = replace(hardware, between=link)
            fitted = self._models["probe"].fit(hardware, found, "probe")
            for axis in self._axes:
                fitted = axis.fit(fitted, found[axis.cost], self._ranks.world_size)
                hardware = _with(hardware, {axis.cost: getattr(fitted, axis.cost)})
        return self._models["model"].fit(hardware, found, "model")

    def _note(self, name: str, value: float) -> None:
        self._found[name].append(value)

    def _machine(self) -> None:
        """What one process finds out."""
        device, cores = self._device, self._base.cores
        self._note("gflops", _matrix_gflops(device, torch.float32))
        self._note("gflops_bf16", _matrix_gflops(device, torch.bfloat16))
        self._note("memory_gb_s", _memory_gb_s(device))
        self._note("operator_us", 1e6 * _typical(_small_operator(device), device, repeat=200))
        if cores > 1 and device.type == "cpu" and self._ranks is None:
            self._note("crowding", _crowding(cores))
        for name, codec in _CODECS.items():
            for unit, value in _codec_speed(codec).items():
                self._note(f"{name} {unit}", value)
        for name, model in self._models.items():
            for part, value in model.measure().items():
                self._note(f"{name} {part}", value)

    def _together(self) -> None:
        """How much slower the model is on ranks that all compute, beyond their taking turns on cores."""
        if self._ranks is None:
            return
        in_turn = self._base.ranks_a_core(self._ranks.world_size)
        _meet(self._ranks)
        took = self._models["model"].crowded_s(in_turn > 1)
        mean = sum_numbers(self._ranks, [took])[0] / self._ranks.world_size
        if self._ranks.rank == 0:
            self._note("crowding", mean / self._found["model many_s"][-1] / in_turn)

    def _link(self, ranks: Transport) -> None:
        others = ranks.world_size - 1
        small, large = (torch.zeros(size, dtype=torch.uint8, device=ranks.device) for size in (8, _MESSAGE))

        def gather(message: Tensor, times: int) -> tuple[float, float]:
            """Seconds of the middle one of so many, and those of the processor."""
            took, cpu = [], time.process_time()
            for _ in range(times):
                started = time.perf_counter()
                ranks.all_gather(message).wait().cpu()
                took.append(time.perf_counter() - started)
            return median(took), (time.process_time() - cpu) / times

        gather(small, 2)
        latency, least_cpu = gather(small, 40)
        took, cpu = gather(large, 3)
        sent = others * large.numel()
        self._note("latency_us", 1e6 * latency / others)
        self._note("gbit_s", 8 * sent / max(took - latency, 1e-9) / 1e9)
        self._note("cpu_ns_per_byte", 1e9 * max(0.0, cpu - least_cpu) / sent)


# Models -----------------------------------------------------------------------------------------------------------


class _Model:
    """Updates of a setting's model on one process, with batches of two sizes."""

    def __init__(self, setting: Setting, device: torch.device) -> None:
        self.setting, self._device = setting, device
        largest = max(1, setting.batch_size // setting.micro_batches)
        self._sizes = (max(1, largest // 4), largest)
        model = copy.deepcopy(setting.model).to(device)
        step = StepConfig(precision="bf16" if setting.bf16 else "fp32", check_replicas_every=0)
        self._job = Job(model, optimizer=setting.optimizer, step=step)
        inputs = setting.sample.expand(largest, *setting.sample.shape[1:]).contiguous().to(device)
        with torch.no_grad():
            shape = model(inputs[:1]).shape
        self._batch = inputs, torch.zeros((largest, *shape[1:-1]), dtype=torch.long, device=device)

    def measure(self) -> dict[str, float]:
        """Seconds of forward and backward passes of few and many samples, and of a whole update, in turns."""
        few, many = self._sizes
        calls = {
            "few_s": lambda: self._pass(few),
            "many_s": lambda: self._pass(many),
            "update_s": lambda: self._job.step(*self._batch),
        }
        times: dict[str, list[float]] = defaultdict(list)
        end = time.perf_counter() + 3 * _SLICE_S
        while len(times["few_s"]) < 4 or time.perf_counter() < end:
            for name, call in calls.items():
                times[name].append(_mean_of(call, self._device))
        return {name: median(some[1:]) for name, some in times.items()}

    def crowded_s(self, in_turn: bool) -> float:
        """Of forward and backward pass beside other ranks; ranks that take turns on a core wait in some calls only."""
        times: list[float] = []
        end = time.perf_counter() + 2 * _SLICE_S
        while len(times) < 4 or time.perf_counter() < end:
            times.append(_mean_of(lambda: self._pass(self._sizes[1]), self._device))
        return sum(times[1:]) / len(times[1:]) if in_turn else median(times[1:])

    def _pass(self, size: int) -> None:
        inputs, targets = self._batch
        self._job.optimizer.zero_grad(set_to_none=True)
        self._job.compute.backward(inputs[:size], targets[:size])

    def fit(self, hardware: Hardware, found: dict[str, float], name: str) -> Hardware:
        """Measured against modelled: a factor on what grows with the batch, what each operator has, and each update."""
        bare = replace(hardware, memory_gib=1e9, efficiency=1.0, operator_us=0.0, autograd_us=0.0, step_overhead_ms=0.0)
        few, many = (found[f"{name} {size}"] for size in ("few_s", "many_s"))
        grows, starts = [], 0.0
        for size in self._sizes:
            setting = replace(self.setting, batch_size=size, micro_batches=1)
            grows.append(Planner(setting, bare).predict(Plan(), 1).time.compute)
            starts = Planner(setting, replace(bare, autograd_us=1.0)).predict(Plan(), 1).time.compute - grows[-1]
        small, large = grows
        most = many / large
        factor = (many - few) / (large - small) if large > 1.2 * small else most
        # A noisy moment must not turn into a negative time.
        factor = min(max(factor, 0.4 * most), most)
        autograd_us = max(0.0, (many - factor * large) / starts - hardware.operator_us)
        fitted = replace(hardware, efficiency=factor, autograd_us=autograd_us, step_overhead_ms=0.0)
        setting = replace(self.setting, batch_size=self._sizes[1], micro_batches=1)
        update = Planner(setting, replace(fitted, memory_gib=1e9)).predict(Plan(), 1).time.update
        rest = found[f"{name} update_s"] - many - update
        return replace(fitted, step_overhead_ms=max(0.0, 1e3 * rest))


@dataclass
class Axis:
    """Steps of a probe under a plan, whose time says what one figure is."""

    cost: str
    setting: Setting
    plan: Plan
    step: Callable[[], object]
    num_steps: int

    def step_s(self, ranks: Transport) -> float:
        """The middle one of some."""
        _meet(ranks)
        return median(_mean_of(self.step, ranks.device) for _ in range(self.num_steps))

    def fit(self, hardware: Hardware, measured_s: float, world_size: int) -> Hardware:
        """With the figure that makes the prediction right, by bisection: time rises with every figure."""
        planner = Planner(self.setting, hardware)

        def with_cost(value: float) -> Hardware:
            return _with(hardware, {self.cost: value, "memory_gib": 1e9})

        def seconds(value: float) -> float:
            planner.hardware = with_cost(value)
            return planner.predict(self.plan, world_size).time.total

        low, high = 0.0, 1e5
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if seconds(middle) < measured_s else (low, middle)
        return _with(hardware, {self.cost: low})


def _meet(ranks: Transport) -> None:
    ranks.all_gather(torch.zeros(1, device=ranks.device)).wait()


def _probe(world_size: int) -> Setting:
    torch.manual_seed(0)
    sample = torch.zeros((1, _PROBE["context"]), dtype=torch.int64)
    optimizer = OptimizerConfig(lr=1e-3, schedule="constant")
    return Setting(build_model("char-transformer", **_PROBE), sample, 4 * world_size, optimizer)


def _axes(probe: Setting, ranks: Transport) -> list[Axis]:
    """In the order in which their figures can be found: each plan costs what those before it cost, and its own."""
    wide = replace(probe, model=nn.Sequential(nn.Linear(1024, 512)), sample=torch.zeros(1, 1024))
    made = [
        _axis(ranks.device, "collective_us", probe, Plan(), 20),
        _axis(ranks.device, "gathered_layer_us", probe, Plan(shard="full"), 12),
        _axis(ranks.device, "gathered_ns_per_byte", wide, Plan(shard="full"), 4),
    ]
    if ranks.world_size % 2 == 0:
        made += [
            _axis(ranks.device, "divided_operator_us", probe, Plan(tensor=2), 6),
            _axis(ranks.device, "handover_us", probe, Plan(pipeline=2), 15),
            _axis(ranks.device, "split_operator_us", probe, Plan(pipeline=2, schedule="interleaved_zero_bubble"), 8),
        ]
    return made


def _axis(device: torch.device, cost: str, setting: Setting, plan: Plan, num_steps: int) -> Axis:
    inputs = setting.sample.expand(setting.batch_size, *setting.sample.shape[1:]).contiguous()
    targets = torch.zeros(inputs.shape if inputs.dtype == torch.int64 else len(inputs), dtype=torch.long)
    job = plan.apply(copy.deepcopy(setting.model).to(device), inputs, optimizer=setting.optimizer)
    batch = job.share(inputs, targets)
    for _ in range(2):
        job.step(*batch)
    return Axis(cost, setting, plan, lambda: job.step(*batch), num_steps)


def _with(hardware: Hardware, figures: Mapping[str, Any]) -> Hardware:
    return replace(hardware, **figures)


# Single figures ---------------------------------------------------------------------------------------------------


def _matrix_gflops(device: torch.device, dtype: torch.dtype) -> float:
    size = 4096
    if device.type == "cpu":  # many have no bf16 and take dozens of times as long
        size = 512 if dtype == torch.float32 else 256
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _typical(lambda: a @ b, device) / 1e9


def _memory_gb_s(device: torch.device) -> float:
    source = torch.zeros(1 << 23, device=device)  # 32 MB, more than most caches
    target = torch.empty_like(source)
    return 2 * 4 * source.numel() / _typical(lambda: target.copy_(source), device) / 1e9


def _small_operator(device: torch.device) -> Callable[[], object]:
    tiny = torch.zeros(8, device=device)
    return lambda: torch.relu(tiny)


def _crowding(cores: int) -> float:
    """How much longer the same work takes while all cores do it."""

    def work() -> float:
        a, big = torch.randn(256, 256), torch.zeros(1 << 21)
        return _typical(lambda: (a @ a, big + 1), torch.device("cpu"))

    alone = work()
    times: list[float] = []
    threads = [threading.Thread(target=lambda: times.append(work())) for _ in range(cores)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return max(1.0, max(times) / alone)


def _codec_speed(codec: Codec) -> dict[str, float]:
    """Of the exchange of many small tensors and of a large one, between this process and its echo."""
    many, large = (_exchange_s(codec, *tensors) for tensors in (_MANY, _LARGE))
    (num, shape), (_, whole) = _MANY, _LARGE
    few_elements, elements = num * shape[0] * shape[1], whole[0] * whole[1]
    found = {}
    for part, one, other in zip(("encode", "decode"), many, large, strict=True):
        ns = max(0.0, (other - one / num) / elements)
        found[f"{part}_ns"] = 1e9 * ns
        found[f"{part}_us"] = 1e6 * max(0.0, one - few_elements * ns) / num
    return found


def _exchange_s(codec: Codec, num: int, shape: tuple[int, int]) -> tuple[float, float]:
    """Encoding and what is around it, and decoding, of one payload."""
    model = nn.ParameterList([nn.Parameter(torch.zeros(shape)) for _ in range(num)])
    sync = GradSync(codec, _Echo(), SyncConfig(algorithm="gather"))
    sync.wrap(model)
    gradients = [torch.randn(shape) for _ in range(num)]
    passes = torch.zeros(1 << 20)
    times: list[tuple[float, float]] = []
    end = time.perf_counter() + _SLICE_S
    while len(times) < 5 or time.perf_counter() < end:
        for parameter, gradient in zip(model, gradients, strict=True):
            parameter.grad = gradient.clone()
        passes.add_(1)  # as forward and backward pass, leaves little in the caches
        started = time.perf_counter()
        sync.finish()
        sync.settle(True)
        times.append((time.perf_counter() - started, sync.stats()["decode_s"]))
    whole, decode = (median(values) for values in zip(*times[2:], strict=True))
    payloads = 1 if codec.combine in ("sum", "low_rank") else 2
    return whole - decode, decode / payloads


class _Echo:
    """A transport whose other rank sends what this one does."""

    rank, world_size, device = 0, 2, torch.device("cpu")

    def all_gather(self, message: Tensor) -> "_Done":
        """Twice the message."""
        return _Done(torch.stack([message, message]))

    def all_to_all(self, message: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int]) -> "_Done":
        """Not used by a gather."""
        raise NotImplementedError

    def all_reduce(self, values: Tensor) -> "_Done":
        """Whatever they are."""
        return _Done(values)

    def broadcast(self, values: Tensor) -> "_Done":
        """From this rank."""
        return _Done(values)

    def split(self, node_size: int) -> "tuple[_Echo, _Echo]":
        """Not used without nodes."""
        raise NotImplementedError

    def second(self) -> None:
        """There is none."""


@dataclass
class _Done:
    result: Tensor

    def wait(self) -> Tensor:
        """At once."""
        return self.result


def _typical(function: Callable[[], object], device: torch.device, *, repeat: int = 1) -> float:
    """Seconds of the middle call within a slice of time."""
    for _ in range(2):
        function()
    times: list[float] = []
    end = time.perf_counter() + _SLICE_S
    while len(times) < 3 or time.perf_counter() < end:
        times.append(_mean_of(function, device, repeat))
    return median(times)


def _mean_of(function: Callable[[], object], device: torch.device, repeat: int = 1) -> float:
    _wait(device)
    started = time.perf_counter()
    for _ in range(repeat):
        function()
    _wait(device)
    return (time.perf_counter() - started) / repeat


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

"""Measures in about two seconds what the planner needs to know of this machine."""

import copy
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from efftrain.compression import Codec, Feedback, Int8, LowRank, TopK
from efftrain.parallel.backends import Transport
from efftrain.parallel.plan import Plan
from efftrain.parallel.planner.hardware import CodecSpeed, Hardware, Link
from efftrain.parallel.planner.predict import Planner
from efftrain.parallel.planner.setting import Setting
from efftrain.training import Job, StepConfig

_SLICE_S = 0.15
_CODECS: dict[str, Codec] = {"Int8": Int8(), "TopK": TopK(0.01), "LowRank": LowRank(2)}
_ELEMENTS = 1 << 19


def calibrate(base: Hardware, setting: Setting, *, rounds: int = 1) -> Hardware:
    """Figures of this machine, and how the setting's model runs on it.

    Args:
        base: What is not measured stays as it is: cores, ranks of a machine, memory of a rank, links.
        setting: Its model makes a few updates, on one process.
        rounds: Measure everything so often and keep the best of each, on a machine that does other work, too.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    crowds = base.cores > 1 and device.type == "cpu"
    largest = max(1, setting.batch_size // setting.micro_batches)
    few, many = (_Updates(setting, size, device) for size in (max(1, largest // 4), largest))
    found = _round(base, device, crowds)
    few_s, many_s = few.step_s(), many.step_s()
    for _ in range(rounds - 1):
        found = _best(found, _round(base, device, crowds))
        few_s, many_s = min(few_s, few.step_s()), min(many_s, many.step_s())
    return _fit(found, (few.setting, few_s), (many.setting, many_s))


def measure_link(transport: Transport, base: Link) -> Link:
    """Of the processes that a launcher started. Every rank calls it.

    Args:
        transport: All ranks.
        base: CPU time of a byte stays as it is.
    """
    others = transport.world_size - 1
    small, large = (torch.zeros(size, dtype=torch.uint8, device=transport.device) for size in (8, 1 << 21))

    def gather(message: torch.Tensor, times: int) -> float:
        """The fastest of so many: all ranks must make the same calls."""
        found = []
        for _ in range(times):
            started = time.perf_counter()
            transport.all_gather(message).wait().cpu()
            found.append(time.perf_counter() - started)
        return min(found)

    latency = gather(small, 30)
    took = gather(large, 4) - latency
    return replace(base, latency_us=1e6 * latency, gbit_s=8 * others * large.numel() / max(took, 1e-9) / 1e9)


def _round(base: Hardware, device: torch.device, crowds: bool) -> Hardware:
    return replace(
        base,
        name=f"{base.name}, calibrated",
        gflops=_matrix_gflops(device, torch.float32),
        gflops_bf16=_matrix_gflops(device, torch.bfloat16),
        memory_gb_s=_memory_gb_s(device),
        operator_us=1e6 * _fastest(_small_operator(device), device, repeat=200),
        crowding=_crowding(base.cores) if crowds else base.crowding,
        codecs={**base.codecs, **{name: _codec_speed(codec) for name, codec in _CODECS.items()}},
        efficiency=1.0,
        step_overhead_ms=0.0,
    )


def _best(one: Hardware, other: Hardware) -> Hardware:
    faster = {name: max(getattr(one, name), getattr(other, name)) for name in ("gflops", "gflops_bf16", "memory_gb_s")}
    shorter = {name: min(getattr(one, name), getattr(other, name)) for name in ("operator_us", "crowding")}
    codecs = {
        name: CodecSpeed(
            encode_ns=min(speed.encode_ns, other.codecs[name].encode_ns),
            decode_ns=min(speed.decode_ns, other.codecs[name].decode_ns),
        )
        for name, speed in one.codecs.items()
    }
    return replace(one, **faster, **shorter, codecs=codecs)


def _fit(hardware: Hardware, few: tuple[Setting, float], many: tuple[Setting, float]) -> Hardware:
    """Measured against modelled time of updates of two sizes: a factor, and what every update has."""
    modelled, measured = [], []
    for setting, step_s in (few, many):
        parts = Planner(setting, replace(hardware, memory_gib=1e9)).predict(Plan(), 1).time
        modelled.append(parts.compute)
        measured.append(max(step_s - parts.update, 0.1 * step_s))
    most = measured[1] / modelled[1]
    slope = (measured[1] - measured[0]) / (modelled[1] - modelled[0]) if modelled[1] > modelled[0] else most
    # A noisy moment must not turn into a negative time.
    slope = min(max(slope, 0.5 * most), most)
    return replace(hardware, efficiency=slope, step_overhead_ms=1e3 * (measured[1] - slope * modelled[1]))


class _Updates:
    """Updates of a setting's model on one process, with batches of one size."""

    def __init__(self, setting: Setting, size: int, device: torch.device) -> None:
        self.setting, self._device = replace(setting, batch_size=size, micro_batches=1), device
        model = copy.deepcopy(setting.model).to(device)
        step = StepConfig(precision="bf16" if setting.bf16 else "fp32", check_replicas_every=0)
        self._job = Job(model, optimizer=setting.optimizer, step=step)
        self._inputs = setting.sample.expand(size, *setting.sample.shape[1:]).contiguous().to(device)
        with torch.no_grad():
            shape = model(self._inputs[:1]).shape
        self._targets = torch.zeros((size, *shape[1:-1]), dtype=torch.long, device=device)

    def step_s(self) -> float:
        """Of the fastest."""
        return _fastest(lambda: self._job.step(self._inputs, self._targets), self._device, slice_s=2 * _SLICE_S)


def _matrix_gflops(device: torch.device, dtype: torch.dtype) -> float:
    size = 512 if device.type == "cpu" else 4096
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _fastest(lambda: a @ b, device) / 1e9


def _memory_gb_s(device: torch.device) -> float:
    source = torch.zeros(1 << 23, device=device)  # 32 MB, more than most caches
    target = torch.empty_like(source)
    return 2 * 4 * source.numel() / _fastest(lambda: target.copy_(source), device) / 1e9


def _small_operator(device: torch.device) -> Callable[[], object]:
    tiny = torch.zeros(8, device=device)
    return lambda: torch.relu(tiny)


def _crowding(cores: int) -> float:
    """How much longer the same work takes while all cores do it."""

    def work() -> float:
        a, big = torch.randn(256, 256), torch.zeros(1 << 21)
        return _fastest(lambda: (a @ a, big + 1), torch.device("cpu"))

    alone = work()
    times: list[float] = []
    threads = [threading.Thread(target=lambda: times.append(work())) for _ in range(cores)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return max(1.0, max(times) / alone)


def _codec_speed(codec: Codec) -> CodecSpeed:
    values = np.random.default_rng(0).standard_normal(_ELEMENTS, dtype=np.float32)
    shaped = codec.for_tensor((512, _ELEMENTS // 512))
    feedback, out = Feedback(shaped), np.zeros_like(values)

    def encode() -> None:
        feedback.encode("w", values)
        feedback.settle(True)

    cpu = torch.device("cpu")
    encoding = _fastest(encode if codec.combine != "low_rank" else lambda: shaped.encode(values), cpu)
    payload = shaped.encode(values)
    decoding = _fastest(lambda: shaped.decode_add(payload, out), cpu)
    return CodecSpeed(encode_ns=1e9 * encoding / _ELEMENTS, decode_ns=1e9 * decoding / _ELEMENTS)


def _fastest(
    function: Callable[[], object],
    device: torch.device,
    *,
    repeat: int = 1,
    slice_s: float = _SLICE_S,
) -> float:
    """Seconds of the fastest call within a slice of time: what the machine can, whatever else it does meanwhile."""
    for _ in range(2):
        function()
    times: list[float] = []
    end = time.perf_counter() + slice_s
    while len(times) < 3 or time.perf_counter() < end:
        _wait(device)
        started = time.perf_counter()
        for _ in range(repeat):
            function()
        _wait(device)
        times.append((time.perf_counter() - started) / repeat)
    return min(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

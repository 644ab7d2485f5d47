"""Measures in about two seconds what the planner needs to know of this machine."""

import copy
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import numpy as np
import torch

from efftrain.compression import Codec, Feedback, Int8, LowRank, TopK
from efftrain.parallel.backends import Transport
from efftrain.parallel.hardware import CodecSpeed, Hardware, Link
from efftrain.parallel.plan import Plan
from efftrain.parallel.planner import Planner, Setting
from efftrain.training import Job, StepConfig

_SLICE_S = 0.15
_CODECS: dict[str, Codec] = {"Int8": Int8(), "TopK": TopK(0.01), "LowRank": LowRank(2)}
_ELEMENTS = 1 << 19


def calibrate(base: Hardware, setting: Setting) -> Hardware:
    """Figures of this machine, and how the setting's model runs on it.

    Args:
        base: What is not measured stays as it is: cores, ranks of a machine, memory of a rank on the CPU, links.
        setting: Its model makes a few updates, on one process.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = replace(
        base,
        name=f"{base.name}, calibrated",
        gflops=_matrix_gflops(device, torch.float32),
        gflops_bf16=_matrix_gflops(device, torch.bfloat16),
        memory_gb_s=_memory_gb_s(device),
        operator_us=1e6 * _fastest(_small_operator(device), device, repeat=200),
        crowding=_crowding(base.cores) if base.cores > 1 and device.type == "cpu" else base.crowding,
        codecs={**base.codecs, **{name: _codec_speed(codec) for name, codec in _CODECS.items()}},
        efficiency=1.0,
        step_overhead_ms=0.0,
    )
    return _fit_model(found, setting, device)


def measure_link(transport: Transport, base: Link) -> Link:
    """Of the processes that a launcher started. Every rank calls it.

    Args:
        transport: All ranks.
        base: CPU time of a byte stays as it is.
    """
    others = transport.world_size - 1
    small, large = (torch.zeros(size, dtype=torch.uint8, device=transport.device) for size in (8, 1 << 21))

    def gather(message: torch.Tensor) -> Callable[[], object]:
        return lambda: transport.all_gather(message).wait()

    latency = _fastest(gather(small), transport.device)
    took = _fastest(gather(large), transport.device) - latency
    return replace(base, latency_us=1e6 * latency, gbit_s=8 * others * large.numel() / max(took, 1e-9) / 1e9)


def _fit_model(hardware: Hardware, setting: Setting, device: torch.device) -> Hardware:
    """Measured against modelled time of updates of two sizes: a factor, and what every update has."""
    largest = max(1, setting.batch_size // setting.micro_batches)
    sizes = sorted({largest, max(1, largest // 4)})
    points = []
    for size in sizes:
        one = replace(setting, batch_size=size, micro_batches=1)
        parts = Planner(one, replace(hardware, memory_gib=1e9)).predict(Plan(), 1).time
        points.append((parts.compute, _step_s(one, device) - parts.update))
    (few, few_s), (many, many_s) = points[0], points[-1]
    slope = (many_s - few_s) / (many - few) if many > few else many_s / many
    # A noisy moment must not turn into a negative time.
    slope = min(max(slope, 0.3 * many_s / many), many_s / many)
    overhead = max(0.0, many_s - slope * many)
    return replace(hardware, efficiency=slope, step_overhead_ms=1e3 * overhead)


def _step_s(setting: Setting, device: torch.device) -> float:
    model = copy.deepcopy(setting.model).to(device)
    job = Job(model, optimizer=setting.optimizer, step=StepConfig(precision="bf16" if setting.bf16 else "fp32"))
    inputs = setting.sample.expand(setting.batch_size, *setting.sample.shape[1:]).contiguous().to(device)
    with torch.no_grad():
        shape = model(inputs[:1]).shape
    targets = torch.zeros((setting.batch_size, *shape[1:-1]), dtype=torch.long, device=device)
    return _fastest(lambda: job.step(inputs, targets), device, slice_s=2 * _SLICE_S)


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
        return _fastest(lambda: (a @ a, big + 1), torch.device("cpu"), middle=True)

    alone = work()
    times: list[float] = []
    threads = [threading.Thread(target=lambda: times.append(work())) for _ in range(cores)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return max(1.0, median(times) / alone)


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
    middle: bool = False,
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
    return median(times) if middle else min(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

"""Instructions of every kernel call of one MCUNet-5fps training step, as code of a Cortex-M in an emulator.

    python benchmarks/device_kernels.py [--cpu cortex-m7] [--optimize=-O3] [--calls]

The layers are those of MCUNet-5fps at 128x128x3 with 10 classes; trained are 20 biases, parts of 3 expansions and the
head (the "49kb" scheme of On-Device Training Under 256KB Memory). Weights, inputs and gradients are random: the
instruction counts hardly depend on them. A whole step adds what the generated code does between the calls.
"""

import argparse
import time
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from efftrain.ondevice.backends.kernels import BoardKernels, HostKernels, Struct, Value

SGD = Struct(0, None, 0, 0, 0, 0)

# kind, input height = width, input channels, output channels, kernel, stride, bias trained, input channels trained
LAYERS: tuple[tuple[str, int, int, int, int, int, int, int], ...] = (
    ("conv", 128, 3, 16, 3, 2, 0, 0), ("depthwise", 64, 16, 16, 3, 1, 0, 0), ("conv", 64, 16, 8, 1, 1, 0, 0),
    ("conv", 64, 8, 32, 1, 1, 0, 0), ("depthwise", 64, 32, 32, 3, 2, 0, 0), ("conv", 32, 32, 16, 1, 1, 0, 0),
    ("conv", 32, 16, 48, 1, 1, 0, 0), ("depthwise", 32, 48, 48, 3, 1, 0, 0), ("conv", 32, 48, 16, 1, 1, 0, 0),
    ("add", 32, 16, 16, 1, 1, 0, 0),
    ("conv", 32, 16, 48, 1, 1, 0, 0), ("depthwise", 32, 48, 48, 7, 2, 0, 0), ("conv", 16, 48, 24, 1, 1, 0, 0),
    ("conv", 16, 24, 120, 1, 1, 0, 0), ("depthwise", 16, 120, 120, 3, 1, 0, 0), ("conv", 16, 120, 24, 1, 1, 0, 0),
    ("add", 16, 24, 24, 1, 1, 0, 0),
    ("conv", 16, 24, 120, 1, 1, 0, 0), ("depthwise", 16, 120, 120, 3, 2, 0, 0), ("conv", 8, 120, 40, 1, 1, 0, 0),
    ("conv", 8, 40, 160, 1, 1, 0, 0), ("depthwise", 8, 160, 160, 7, 1, 0, 0), ("conv", 8, 160, 40, 1, 1, 0, 0),
    ("add", 8, 40, 40, 1, 1, 0, 0),
    ("conv", 8, 40, 160, 1, 1, 0, 0), ("depthwise", 8, 160, 160, 5, 1, 1, 0), ("conv", 8, 160, 48, 1, 1, 1, 0),
    ("conv", 8, 48, 144, 1, 1, 1, 12), ("depthwise", 8, 144, 144, 3, 1, 1, 0), ("conv", 8, 144, 48, 1, 1, 1, 0),
    ("add", 8, 48, 48, 1, 1, 1, 0),
    ("conv", 8, 48, 192, 1, 1, 1, 24), ("depthwise", 8, 192, 192, 3, 1, 1, 0), ("conv", 8, 192, 48, 1, 1, 1, 0),
    ("add", 8, 48, 48, 1, 1, 1, 0),
    ("conv", 8, 48, 240, 1, 1, 1, 24), ("depthwise", 8, 240, 240, 7, 2, 1, 0), ("conv", 4, 240, 96, 1, 1, 1, 0),
    ("conv", 4, 96, 384, 1, 1, 1, 0), ("depthwise", 4, 384, 384, 5, 1, 1, 0), ("conv", 4, 384, 96, 1, 1, 1, 0),
    ("add", 4, 96, 96, 1, 1, 1, 0),
    ("conv", 4, 96, 384, 1, 1, 1, 0), ("depthwise", 4, 384, 384, 5, 1, 1, 0), ("conv", 4, 384, 96, 1, 1, 1, 0),
    ("add", 4, 96, 96, 1, 1, 1, 0),
    ("conv", 4, 96, 576, 1, 1, 1, 0), ("depthwise", 4, 576, 576, 3, 1, 1, 0), ("conv", 4, 576, 160, 1, 1, 1, 0),
    ("average", 4, 160, 160, 1, 1, 1, 0), ("head", 1, 160, 10, 1, 1, 1, 160),
)  # fmt: skip


@dataclass(frozen=True)
class Call:
    """One call of the training step."""

    forward: bool
    layer: str
    kernel: str
    arguments: tuple[Value, ...]
    macs: int


def calls() -> list[Call]:
    """All calls of the training step, with random contents."""
    rng = np.random.default_rng(0)
    out: list[Call] = []

    def int8(*shape: int) -> np.ndarray:
        return rng.integers(-127, 128, shape).astype(np.int8)

    def int16(*shape: int) -> np.ndarray:
        return rng.integers(-16383, 16384, shape).astype(np.int16)

    def bits(count: int) -> np.ndarray:
        return rng.integers(0, 256, (count + 7) // 8).astype(np.uint8)

    first_trained = next(i for i, layer in enumerate(LAYERS) if layer[6])
    for number, (kind, size, in_c, out_c, k, stride, trained, trained_c) in enumerate(LAYERS):
        size_out = (size - 1) // stride + 1
        name = f"{number:2} {kind} {size}x{size}x{in_c} {k}x{k}/{stride} {out_c}"
        count = size * size * in_c
        x, g = int8(size, size, in_c), int16(size_out, size_out, out_c)
        y = np.zeros(size_out * size_out * out_c, np.int8)
        mask = bits(y.size) if trained else None
        x_mask = bits(count)
        gx, scratch = np.zeros(x.size, np.int16), np.zeros(max(in_c, out_c), np.int32)
        gradient = Struct(g, 14, -30)
        multiplier = rng.integers(1 << 30, (1 << 31) - 1, out_c).astype(np.int32)
        factors = Struct(multiplier, rng.integers(37, 42, out_c).astype(np.int16))
        backward = number > first_trained

        def add(forward: bool, kernel: str, *arguments: Value, macs: int, name: str = name) -> None:
            out.append(Call(forward, name, kernel, arguments, macs))

        if kind == "add":
            add(True, "eft_add_s8", x, int8(count), Struct(0, 1 << 19, 0, 1 << 19, 20, 0, -128, -128), count, y, mask,
                macs=count)  # fmt: skip
            if backward:
                other = Struct(int16(count), 14, -30)
                add(False, "eft_gradient_sum_s16", gradient, other, 1 << 30, 31, count, x_mask, gx,
                    np.zeros(1, np.int32), macs=count)  # fmt: skip
            continue
        if kind == "average":
            add(True, "eft_global_average_s8", x, size * size, in_c, 0, 1 << 30, 35, y, macs=count)
            add(False, "eft_global_average_grad_s16", g, size * size, in_c, x_mask, gx, macs=count)
            continue
        shape = Struct(size, size, in_c, size_out, size_out, out_c, k, k, stride, stride, k // 2, k // 2)
        filters = (k, k, in_c) if kind == "depthwise" else (out_c, k, k, in_c)
        weights = Struct(int8(*filters[:-1], trained_c), int8(*filters[:-1], in_c - trained_c), trained_c)
        bias = rng.integers(-1000, 1000, out_c).astype(np.int32)
        macs = size_out * size_out * int(np.prod(filters))
        depthwise = kind == "depthwise"
        if kind == "head":
            add(True, "eft_head_s8", x, shape, 0, weights, bias, factors, np.zeros(out_c, np.int16), macs=macs)
            add(False, "eft_softmax_loss_s16", int16(out_c), out_c, 3, g.ravel(), macs=out_c)
        else:
            linear = out_c < in_c
            requantize = Struct(factors, 0 if linear else -128, -128, -128 if linear else -127)
            add(True, "eft_depthwise_s8" if depthwise else "eft_conv_s8", x, shape,
                0 if out_c > in_c else -128, weights, bias, requantize,
                Struct(0, size_out, size), y, mask, macs=macs)  # fmt: skip
        if backward:
            terms = k * k * (1 if depthwise else out_c)
            operand = min(15, 24 - (terms - 1).bit_length())
            constants = Struct(rng.integers(1, 32768, out_c).astype(np.int16), operand, 8)
            kernel = "eft_depthwise_input_grad_s16" if depthwise else "eft_conv_input_grad_s16"
            add(False, kernel, g, 14, shape, weights, constants, x_mask, gx, scratch, macs=macs)
        if trained_c:
            add(False, "eft_conv_update_master_s8", x, 0, gradient, shape, factors, SGD, weights.members[0],
                int8(*filters[:-1], trained_c), trained_c, macs=macs * trained_c // in_c)  # fmt: skip
        if trained:
            pixels = size_out * size_out
            add(False, "eft_bias_update_s32", gradient, pixels, out_c, factors, SGD, bias, macs=pixels * out_c)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", default="cortex-m7", help="host, cortex-m0plus, cortex-m4, cortex-m7 or cortex-m33")
    parser.add_argument("--optimize", default="", help="for example -O3; the firmware's own if not given")
    parser.add_argument("--calls", action="store_true", help="print every call, not the sums by kernel alone")
    arguments = parser.parse_args()
    host = arguments.cpu == "host"
    board = None if host else BoardKernels(arguments.cpu, optimize=arguments.optimize)
    library = HostKernels(extra=(arguments.optimize,) if arguments.optimize else ()) if host else None
    unit = "ns" if host else "instructions"
    spent: dict[tuple[bool, str], list[int]] = defaultdict(lambda: [0, 0])
    print(f"| call | kernel | MACs | {unit} | {unit} a MAC |\n|---|---|---|---|---|")
    for call in calls():
        if board:
            cost = board.count(call.kernel, *call.arguments)
        else:
            assert library is not None, "one of the two runs the kernels"
            times = []
            for _ in range(5):
                start = time.perf_counter_ns()
                library.call(call.kernel, *call.arguments)
                times.append(time.perf_counter_ns() - start)
            cost = min(times)
        for key in ((call.forward, call.kernel), (call.forward, "all")):
            spent[key][0] += call.macs
            spent[key][1] += cost
        if arguments.calls:
            print(f"| {call.layer} | {call.kernel} | {call.macs:,} | {cost:,} | {cost / call.macs:.2f} |")
    for forward in (True, False):
        for (part, kernel), (macs, cost) in sorted(spent.items()):
            if part == forward:
                phase = "forward" if forward else "backward"
                print(f"| {phase} | {kernel} | {macs:,} | {cost:,} | {cost / macs:.2f} |")
    total = spent[True, "all"][1] + spent[False, "all"][1]
    print(f"| step | all | | {total:,} | |")


if __name__ == "__main__":
    main()

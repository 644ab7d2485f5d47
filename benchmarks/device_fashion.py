"""Fine-tuning on shifted Fashion-MNIST: what quantization-aware scaling does, and which parameters are worth their RAM.

A network of depthwise-separable convolutions is trained in fp32 on upright images, compiled once per update scheme, and
fine-tuned by the host's C engine on 500 images that are rotated by 20 degrees, have 70 % of the contrast, and are
noisy: six epochs, one image at a time. The same fine-tuning in fp32 runs beside it, at one learning rate, that of the
study of this arithmetic. With and without QAS the best of a grid of rates is shown too; without, the steps are smaller
by the square of each scale, so there the grid lies around one constant, the inverse of the median square over what is
trained.

Source of the setting: Lin et al., On-Device Training Under 256KB Memory (arXiv:2206.15472), sections 3.1 and 3.2.
Differs: its backbone is MCUNet and its data sets are eight others.

    python benchmarks/device_fashion.py --seeds 3 --hardware 2core_x86 --date 2026-11-21
"""

import argparse
import datetime
import json
import math
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from efftrain.data.fashion_mnist import load_fashion_mnist
from efftrain.ondevice import LayerShare, Program, Scheme, compile
from efftrain.ondevice.constants import ConvConstants
from efftrain.ondevice.ir import Conv, FloatGraph, GlobalAverage

SCHEMES = {
    "none": (Scheme(name="none"), 0.02),
    "bias_only": (Scheme(name="bias_only", last_biases=-1), 0.02),
    "last_k=1": (Scheme(name="last_k=1", last_k=1), 0.02),
    "last_k=3": (Scheme(name="last_k=3", last_k=3), 0.02),
    "last_k=5": (Scheme(name="last_k=5", last_k=5), 0.01),
    "sparse": (
        Scheme(
            name="sparse",
            head=True,
            last_biases=6,
            weights=tuple(LayerShare(layer=layer, share=0.5) for layer in ("-1", "-3", "-5")),
        ),
        0.02,
    ),
    "full": (Scheme(name="full", head=True, last_biases=-1, weights=(LayerShare(layer="*"),)), 0.005),
}
"""Scheme, and its learning rate from fp32 alone."""
QAS_FACTORS = (0.5, 1, 2, 4, 8)
NO_QAS_FACTORS = (0.25, 1, 4, 16, 64)
EPOCHS, IMAGES, TESTS = 6, 500, 2000


class Separable(nn.Module):
    """A stem and five pairs of a depthwise and a 1x1 convolution, with batch norms."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []

        def add(inputs: int, outputs: int, kernel: int, stride: int, groups: int = 1) -> None:
            layers.append(nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False))
            layers.extend((nn.BatchNorm2d(outputs), nn.ReLU6()))

        add(1, 16, 3, 2)
        for inputs, outputs, stride in ((16, 24, 1), (24, 48, 2), (48, 48, 1), (48, 96, 2), (96, 96, 1)):
            add(inputs, inputs, 3, stride, inputs)
            add(inputs, outputs, 1, 1)
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(96, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, 10)`` of images ``(B, 1, 28, 28)``."""
        logits: Tensor = self.head(self.features(x).mean((2, 3)))
        return logits


def shifted(images: np.ndarray, seed: int) -> np.ndarray:
    """Rotated by 20 degrees, 70 % of the contrast, noise of 0.05."""
    angle = math.radians(20)
    matrix = torch.tensor([[math.cos(angle), -math.sin(angle), 0.0], [math.sin(angle), math.cos(angle), 0.0]])
    x = torch.from_numpy(images)
    grid = F.affine_grid(matrix.expand(len(x), 2, 3), list(x.shape), align_corners=False)
    rotated = F.grid_sample(x, grid, align_corners=False)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    return (0.7 * rotated + 0.05 * noise).numpy().astype(np.float32)


def pretrain(images: np.ndarray, labels: np.ndarray, epochs: int) -> nn.Module:
    torch.manual_seed(0)
    model = Separable()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    steps = epochs * -(-len(x) // 64)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        order = torch.randperm(len(x))
        for start in range(0, len(x), 64):
            index = order[start : start + 64]
            optimizer.zero_grad()
            F.cross_entropy(model(x[index]), y[index]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return model.eval()


def fine_tune_integer(program: Program, data: "Shift", seed: int) -> float:
    engine = program.host(seed=seed + 1)
    samples = program.quantize_input(data.tune)
    rng = np.random.default_rng(seed)
    for epoch in range(EPOCHS if program.scheme.name != "none" else 0):
        engine.set_lr_shift(3 * epoch // EPOCHS)
        engine.train(samples, data.tune_labels, rng.permutation(len(samples)))
    return 100 * engine.evaluate(program.quantize_input(data.test), data.test_labels)


class Folded:
    """The compiler's own float graph, batch norms folded, with the trained parts of its parameters as leaves."""

    def __init__(self, program: Program) -> None:
        self.graph: FloatGraph = program.float_graph
        self.weights: dict[str, Tensor] = {}
        self.biases: dict[str, Tensor] = {}
        self.trained: list[tuple[Tensor, Tensor | None]] = []
        for op in self.graph.ops:
            if not isinstance(op, Conv):
                continue
            layer = program.layers[op.name]
            assert isinstance(layer, ConvConstants)
            learns = program.trained[op.name]
            weight = torch.from_numpy(self.graph.constants[op.weight].transpose(0, 3, 1, 2).copy())
            assert op.bias is not None
            bias = torch.from_numpy(self.graph.constants[op.bias].copy())
            if learns.channels:
                mask = torch.zeros_like(weight)
                if op.groups > 1:
                    mask[: learns.channels] = 1
                else:
                    mask[:, : learns.channels] = 1
                self.trained.append((weight.requires_grad_(), mask))
            if learns.bias:
                self.trained.append((bias.requires_grad_(), None))
            self.weights[op.name], self.biases[op.name] = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        """Logits ``(B, 10)`` of images ``(B, 1, 28, 28)``."""
        for op in self.graph.ops:
            if isinstance(op, Conv):
                x = F.conv2d(x, self.weights[op.name], self.biases[op.name], op.stride, op.padding, groups=op.groups)
                if op.activation != "none":
                    x = F.relu6(x) if op.activation == "relu6" else F.relu(x)
            else:
                assert isinstance(op, GlobalAverage)
                x = x.mean((2, 3), keepdim=True)
        return x.flatten(1)


def fine_tune_float(program: Program, data: "Shift", seed: int, learning_rate: float) -> float:
    model = Folded(program)
    x, y = torch.from_numpy(data.tune), torch.from_numpy(data.tune_labels)
    rng = np.random.default_rng(seed)
    for epoch in range(EPOCHS if model.trained else 0):
        rate = learning_rate * 0.5 ** (3 * epoch // EPOCHS)
        for index in rng.permutation(len(x)).tolist():
            loss = F.cross_entropy(model(x[index : index + 1]), y[index : index + 1])
            gradients = torch.autograd.grad(loss, [parameter for parameter, _ in model.trained])
            with torch.no_grad():
                for (parameter, mask), gradient in zip(model.trained, gradients, strict=True):
                    parameter.sub_(rate * (gradient if mask is None else gradient * mask))
    with torch.no_grad():
        return float(100 * (model(torch.from_numpy(data.test)).argmax(1).numpy() == data.test_labels).mean())


class Shift:
    """One draw of images to learn from, and the images to be tested on."""

    def __init__(
        self, images: np.ndarray, labels: np.ndarray, tests: np.ndarray, answers: np.ndarray, seed: int
    ) -> None:
        chosen = np.random.default_rng(100 + seed).choice(len(images), IMAGES, replace=False)
        self.tune, self.tune_labels = shifted(images[chosen], seed), labels[chosen]
        self.test, self.test_labels = shifted(tests[:TESTS], 1000), answers[:TESTS]


def matching_constant(program: Program) -> float:
    """What the rate without QAS is multiplied by, so that the median weight, or bias if there is none, steps alike."""
    squares: list[float] = []
    for layer in program.layers.values():
        if isinstance(layer, ConvConstants) and layer.trainable and program.trained[layer.name].channels:
            squares += np.repeat(layer.weight_scale**2, layer.master.size // len(layer.weight_scale)).tolist()
    if not squares:
        for layer in program.layers.values():
            if isinstance(layer, ConvConstants) and layer.trainable and program.trained[layer.name].bias:
                squares += ((layer.x_scale * layer.weight_scale) ** 2).tolist()
    return 1 / float(np.median(squares)) if squares else 1.0


def run(seeds: int, epochs: int) -> dict[str, Any]:
    train, test = load_fashion_mnist("train"), load_fashion_mnist("test")
    images, labels = np.asarray(train.inputs, np.float32), np.asarray(train.targets)
    tests, answers = np.asarray(test.inputs, np.float32), np.asarray(test.targets)
    model = pretrain(images[:40_000], labels[:40_000], epochs)
    with torch.no_grad():
        upright = float(100 * (model(torch.from_numpy(tests)).argmax(1).numpy() == answers).mean())
    print(f"upright: {upright:.1f} %", file=sys.stderr, flush=True)

    def program_of(scheme: Scheme, learning_rate: float, qas: bool) -> Program:
        return compile(
            model,
            torch.zeros(1, 1, 28, 28),
            scheme=scheme,
            board="stm32f746",
            calibration=images[:256],
            learning_rate=learning_rate,
            qas=qas,
        )

    draws = [Shift(images[40_000:], labels[40_000:], tests, answers, seed) for seed in range(seeds)]
    rows: dict[str, Any] = {}
    for name, (scheme, rate) in SCHEMES.items():
        program = program_of(scheme, rate, True)
        row: dict[str, Any] = {"learning_rate": rate, "total_ram_bytes": program.plan.total_ram_bytes}
        row["trained_state_bytes"] = program.plan.trained_state_bytes
        row["qas"] = {}
        for factor in QAS_FACTORS if name != "none" else (1,):
            tuned = program_of(scheme, rate * factor, True)
            row["qas"][str(factor)] = [
                round(fine_tune_integer(tuned, data, seed), 2) for seed, data in enumerate(draws)
            ]
        row["fp32"] = [round(fine_tune_float(program, data, seed, rate), 2) for seed, data in enumerate(draws)]
        grid: dict[str, list[float]] = {}
        constant = matching_constant(program)
        row["no_qas_constant"] = constant
        for factor in NO_QAS_FACTORS if name != "none" else ():
            without = program_of(scheme, rate * constant * factor, False)
            accuracy = [round(fine_tune_integer(without, data, seed), 2) for seed, data in enumerate(draws)]
            grid[str(factor)] = accuracy
        row["no_qas"] = grid
        rows[name] = row
        best, best_qas = (max((float(np.mean(a)) for a in g.values()), default=0.0) for g in (grid, row["qas"]))
        print(
            f"{name}: fp32 {np.mean(row['fp32']):.1f}, QAS {np.mean(row['qas']['1']):.1f}, best {best_qas:.1f}, "
            f"best without {best:.1f}",
            file=sys.stderr,
            flush=True,
        )
    return {"upright": round(upright, 2), "schemes": rows}


def render(result: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = [
        "# Fine-tuning on shifted Fashion-MNIST: update schemes and quantization-aware scaling",
        "",
        f"`{result['command']}` on {result['hardware']}, {result['date']}; {result['duration_s']:.0f} s in all. "
        f"Versions: {', '.join(f'{k} {v}' for k, v in result['versions'].items())}.",
        "",
        f"Upright test images before: {result['upright']} %. Fine-tuned on {IMAGES} shifted images for {EPOCHS} "
        f"epochs, batch 1, rate halved after each third, tested on {TESTS}; means of {result['seeds']} seeds (other "
        "images, other order), the seeds in brackets. 16-bit master weights. `best` is that of a grid of rates: "
        f"{', '.join(f'{f:g}' for f in QAS_FACTORS)} times the one shown with QAS, "
        f"{', '.join(f'{f:g}' for f in NO_QAS_FACTORS)} times a constant that makes the median step alike without. The "
        "best of a grid is chosen on the same test images, which flatters both alike.",
        "",
        "| scheme | lr | fp32 | integer, QAS | difference | QAS, best | no QAS, best | RAM | trained state |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in result["schemes"].items():
        same = row["qas"]["1"]
        cells = [
            name,
            row["learning_rate"],
            _cell(row["fp32"]),
            _cell(same),
            f"{np.mean(same) - np.mean(row['fp32']):+.1f}",
            _best(row["qas"]),
            _best(row["no_qas"]),
            f"{row['total_ram_bytes']:,} B",
            f"{row['trained_state_bytes']:,} B",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join([*lines, ""])


def _best(grid: dict[str, list[float]]) -> str:
    if len(grid) < 2:
        return ""
    best = max(grid, key=lambda factor: float(np.mean(grid[factor])))
    return f"{np.mean(grid[best]):.1f} at {best}"


def _cell(values: list[float]) -> str:
    return f"{np.mean(values):.1f} ({', '.join(f'{value:.1f}' for value in values)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pretrain-epochs", type=int, default=4)
    parser.add_argument("--hardware", required=True)
    parser.add_argument("--date", default=datetime.date.today().isoformat())
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "reports")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    result = run(arguments.seeds, arguments.pretrain_epochs)
    result |= {
        "command": f"python benchmarks/device_fashion.py --seeds {arguments.seeds} "
        f"--pretrain-epochs {arguments.pretrain_epochs}",
        "hardware": arguments.hardware,
        "date": arguments.date,
        "seeds": arguments.seeds,
        "duration_s": time.perf_counter() - start,
        "versions": {"python": platform.python_version(), "torch": version("torch"), "numpy": version("numpy")},
    }
    stem = arguments.out / f"device_fashion_{arguments.hardware}_{arguments.date}"
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    stem.with_suffix(".md").write_text(render(result))
    print(stem.with_suffix(".md"))


if __name__ == "__main__":
    main()

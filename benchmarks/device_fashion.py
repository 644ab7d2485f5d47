"""Fine-tuning on shifted Fashion-MNIST: what quantization-aware scaling does, and which parameters are worth their RAM.

A network is trained in fp32 on upright images, compiled once per update scheme, and fine-tuned by the host's C engine
on 500 images that are rotated by 20 degrees, have 70 % of the contrast, and are noisy: six epochs, one image at a time.
The same fine-tuning in fp32 runs beside it. Each way gets its rate from a grid, by its accuracy on images that neither
train nor test. Without QAS the steps are smaller by the square of each scale, so there the grid lies around one
constant, the inverse of the median square over what is trained.

Source of the setting: Lin et al., On-Device Training Under 256KB Memory (arXiv:2206.15472), sections 3.1 and 3.2; with
``--backbone mcunet-5fps`` its backbone and one of its schemes, too. Differs: its data sets are eight others.

    python benchmarks/device_fashion.py --backbone mcunet-5fps --seeds 3 --hardware 2core_x86

An hour or two with mcunet-5fps; the same command goes on where it was broken off.
"""

import argparse
import datetime
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from efftrain.data.fashion_mnist import load_fashion_mnist
from efftrain.models.inverted_residual import InvertedResidualConfig, MCUNet5fps
from efftrain.ondevice import LayerShare, Program, Scheme, compile
from efftrain.ondevice.constants import ConvConstants
from efftrain.ondevice.ir import Add, Conv, FloatGraph, GlobalAverage
from efftrain.ondevice.reference import bordered

Way = Literal["fp32", "qas", "no_qas"]
RATES = (0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16)
NO_QAS_FACTORS = (0.0625, 0.25, 1, 4, 16, 64)
"""Times the constant of ``matching_constant`` and 0.02."""
EPOCHS, IMAGES, CHOOSING, TESTS = 6, 500, 1000, 2000


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


def schemes_of(names: tuple[str, ...], sparse: Scheme) -> dict[str, Scheme]:
    return {name: Scheme.parse(name) for name in names} | {sparse.name: sparse}


@dataclass(frozen=True)
class Backbone:
    """A network, the size of its images, and the update schemes to compare."""

    build: Callable[[], nn.Module]
    size: int
    schemes: dict[str, Scheme]


BACKBONES = {
    "separable": Backbone(
        Separable,
        28,
        schemes_of(
            ("none", "bias_only", "last_k=1", "last_k=3", "last_k=5", "full"),
            Scheme(
                name="sparse",
                head=True,
                last_biases=6,
                weights=tuple(LayerShare(layer=layer, share=0.5) for layer in ("-1", "-3", "-5")),
            ),
        ),
    ),
    "mcunet-5fps": Backbone(
        lambda: MCUNet5fps(InvertedResidualConfig(in_channels=1, size=64)),
        64,
        schemes_of(
            ("none", "bias_only", "last_k=1", "last_k=3", "last_k=6", "last_k=12", "full"),
            Scheme.parse("mcunetv3-49kb"),
        ),
    ),
}


def enlarged(images: np.ndarray, size: int) -> np.ndarray:
    if images.shape[-1] == size:
        return images
    return F.interpolate(torch.from_numpy(images), size=(size, size), mode="bilinear").numpy()


def shifted(images: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Rotated by 20 degrees, 70 % of the contrast, noise of 0.05."""
    angle = math.radians(20)
    matrix = torch.tensor([[math.cos(angle), -math.sin(angle), 0.0], [math.sin(angle), math.cos(angle), 0.0]])
    x = torch.from_numpy(images)
    grid = F.affine_grid(matrix.expand(len(x), 2, 3), list(x.shape), align_corners=False)
    rotated = F.grid_sample(x, grid, align_corners=False)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    return enlarged((0.7 * rotated + 0.05 * noise).numpy().astype(np.float32), size)


def pretrain(name: str, images: np.ndarray, labels: np.ndarray, epochs: int) -> dict[str, Tensor]:
    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    backbone = BACKBONES[name]
    model = backbone.build()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)
    y = torch.from_numpy(labels)
    steps = epochs * -(-len(images) // 64)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        order = torch.randperm(len(images))
        for start in range(0, len(images), 64):
            index = order[start : start + 64]
            x = torch.from_numpy(enlarged(images[index.numpy()], backbone.size))
            optimizer.zero_grad()
            F.cross_entropy(model(x), y[index]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return model.state_dict()


def fine_tune_integer(program: Program, data: "Shift", seed: int) -> tuple[float, float]:
    engine = program.host(seed=seed + 1)
    samples = program.quantize_input(data.tune)
    rng = np.random.default_rng(seed)
    for epoch in range(EPOCHS if program.scheme.name != "none" else 0):
        engine.set_lr_shift(3 * epoch // EPOCHS)
        engine.train(samples, data.tune_labels, rng.permutation(len(samples)))
    choosing, test = (
        100 * engine.evaluate(program.quantize_input(images), labels)
        for images, labels in ((data.choosing, data.choosing_labels), (data.test, data.test_labels))
    )
    return choosing, test


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
        learning = [i for i, op in enumerate(self.graph.ops) if isinstance(op, Conv) and any(_learns(program, op))]
        self.first = min(learning, default=len(self.graph.ops))

    def frozen(self, x: Tensor) -> dict[str, Tensor]:
        """What the layers before the first that learns give of images, as far as later ones read it."""
        with torch.no_grad():
            values = self._run({self.graph.input: x}, slice(0, self.first))
        read = {name for op in self.graph.ops[self.first :] for name in op.reads} | {self.graph.output}
        return {name: value for name, value in values.items() if name in read}

    def __call__(self, values: dict[str, Tensor]) -> Tensor:
        """Logits ``(B, 10)`` of what ``frozen`` gave."""
        return self._run(dict(values), slice(self.first, None))[self.graph.output].flatten(1)

    def _run(self, values: dict[str, Tensor], part: slice) -> dict[str, Tensor]:
        for op in self.graph.ops[part]:
            if isinstance(op, Conv):
                weight, bias = self.weights[op.name], self.biases[op.name]
                y = F.conv2d(bordered(values[op.x], op.padding, 0.0), weight, bias, op.stride, groups=op.groups)
                if op.activation != "none":
                    y = F.relu6(y) if op.activation == "relu6" else F.relu(y)
            elif isinstance(op, Add):
                y = values[op.x] + values[op.z]
            else:
                assert isinstance(op, GlobalAverage)
                y = values[op.x].mean((2, 3), keepdim=True)
            values[op.y] = y
        return values


def _learns(program: Program, op: Conv) -> tuple[int, bool]:
    return program.trained[op.name].channels, program.trained[op.name].bias


def fine_tune_float(program: Program, data: "Shift", seed: int, learning_rate: float) -> tuple[float, float]:
    model = Folded(program)
    y = torch.from_numpy(data.tune_labels)
    samples = [model.frozen(x[None]) for x in torch.from_numpy(data.tune)]
    rng = np.random.default_rng(seed)
    for epoch in range(EPOCHS if model.trained else 0):
        rate = learning_rate * 0.5 ** (3 * epoch // EPOCHS)
        for index in rng.permutation(len(samples)).tolist():
            loss = F.cross_entropy(model(samples[index]), y[index : index + 1])
            gradients = torch.autograd.grad(loss, [parameter for parameter, _ in model.trained])
            with torch.no_grad():
                for (parameter, mask), gradient in zip(model.trained, gradients, strict=True):
                    parameter.sub_(rate * (gradient if mask is None else gradient * mask))

    def accuracy(images: np.ndarray, labels: np.ndarray) -> float:
        with torch.no_grad():
            batches = torch.from_numpy(images).split_with_sizes([250] * (len(images) // 250))
            parts = [model(model.frozen(batch)).argmax(1).numpy() for batch in batches]
        return float(100 * (np.concatenate(parts) == labels).mean())

    return accuracy(data.choosing, data.choosing_labels), accuracy(data.test, data.test_labels)


class Shift:
    """One draw of images to learn from, the images that rates are chosen by, and those to be tested on."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, size: int, seed: int) -> None:
        test = load_fashion_mnist("test")
        chosen = np.random.default_rng(100 + seed).choice(len(images) - CHOOSING, IMAGES, replace=False)
        self.tune, self.tune_labels = shifted(images[chosen], size, seed), labels[chosen]
        self.choosing, self.choosing_labels = shifted(images[-CHOOSING:], size, 2000), labels[-CHOOSING:]
        tests = np.asarray(test.inputs[:TESTS], np.float32)
        self.test, self.test_labels = shifted(tests, size, 1000), np.asarray(test.targets[:TESTS])


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


class Study:
    """What all runs share; a run of it is a task for a process."""

    def __init__(self, name: str, seeds: int, epochs: int, work: Path) -> None:
        self.backbone = backbone = BACKBONES[name]
        train, test = load_fashion_mnist("train"), load_fashion_mnist("test")
        images, labels = np.asarray(train.inputs, np.float32), np.asarray(train.targets)
        pretrained = work / "pretrained.safetensors"
        if not pretrained.exists():
            with ProcessPoolExecutor(1, get_context("fork")) as alone:  # its threads would not outlive the next fork
                save_file(alone.submit(pretrain, name, images[:40_000], labels[:40_000], epochs).result(), pretrained)
        self.model = backbone.build().eval()
        self.model.load_state_dict(load_file(pretrained))
        self.calibration = enlarged(images[:256], backbone.size)
        right = 0
        with torch.no_grad():
            for start in range(0, len(test.inputs), 250):
                part = enlarged(np.asarray(test.inputs[start : start + 250], np.float32), backbone.size)
                answers = np.asarray(test.targets[start : start + 250])
                right += int((self.model(torch.from_numpy(part)).argmax(1).numpy() == answers).sum())
        self.upright = 100 * right / len(test.inputs)
        self.draws = [Shift(images[40_000:], labels[40_000:], backbone.size, seed) for seed in range(seeds)]

    def program(self, scheme: str, learning_rate: float, qas: bool = True) -> Program:
        """Compiled, whether a board has that much memory or not."""
        return compile(
            self.model,
            torch.zeros(1, 1, self.backbone.size, self.backbone.size),
            scheme=self.backbone.schemes[scheme],
            board="stm32f746",
            calibration=self.calibration,
            learning_rate=learning_rate,
            qas=qas,
            must_fit=False,
        )

    def accuracies(self, scheme: str, way: Way, rate: float, seeds: range) -> list[tuple[float, float]]:
        """Of each seed, on the images to choose by and on those to test on."""
        program = self.program(scheme, rate, way != "no_qas")
        if way == "fp32":
            return [fine_tune_float(program, self.draws[seed], seed, rate) for seed in seeds]
        return [fine_tune_integer(program, self.draws[seed], seed) for seed in seeds]


STUDY: Study
"""Of this process and of those that it forks."""
Run = tuple[str, Way, float, int]
"""Scheme, way, rate, and the first seed: of 0 alone, or of those from 1 on."""


def task(run: Run, seeds: range) -> list[tuple[float, float]]:
    torch.set_num_threads(1)
    scheme, way, rate, _ = run
    return STUDY.accuracies(scheme, way, rate, seeds)


class Results:
    """What is known of runs, in a file that a study that was broken off goes on with."""

    def __init__(self, path: Path, seeds: int) -> None:
        self._path, self._seeds = path, seeds
        self._known: dict[Run, list[tuple[float, float]]] = {}
        for line in path.read_text().splitlines() if path.exists() else []:
            *run, pairs = json.loads(line)
            self._known[tuple(run)] = [tuple(pair) for pair in pairs]

    def find(self, runs: list[Run]) -> None:
        """Do what is not known yet, on all cores."""
        missing = [run for run in runs if run not in self._known]
        with ProcessPoolExecutor(os.cpu_count(), get_context("fork")) as pool:
            found = {pool.submit(task, run, range(1) if run[3] == 0 else range(1, self._seeds)): run for run in missing}
            for number, future in enumerate(as_completed(found), 1):
                run, pairs = found[future], future.result()
                self._known[run] = pairs
                with self._path.open("a") as file:
                    file.write(json.dumps([*run, pairs]) + "\n")
                scheme, way, rate, _ = run
                tests = ", ".join(f"{test:.1f}" for _, test in pairs)
                print(f"{number}/{len(missing)} {scheme} {way} {rate:g}: {tests}", file=sys.stderr, flush=True)

    def of(self, scheme: str, way: Way, rate: float) -> list[tuple[float, float]]:
        """All seeds that are known."""
        return [pair for first in (0, 1) for pair in self._known.get((scheme, way, rate, first), [])]


def run(results: Results) -> dict[str, Any]:
    """All schemes, ways and rates."""
    rows: dict[str, Any] = {}
    grids: dict[tuple[str, Way], tuple[float, ...]] = {}
    for scheme in STUDY.backbone.schemes:
        program = STUDY.program(scheme, 0.02)
        constant = matching_constant(program)
        rows[scheme] = {
            "total_ram_bytes": program.plan.total_ram_bytes,
            "trained_state_bytes": program.plan.trained_state_bytes,
            "no_qas_constant": constant,
        }
        without = tuple(0.02 * factor * constant for factor in NO_QAS_FACTORS)
        ways: dict[Way, tuple[float, ...]] = {"qas": RATES, "no_qas": without}
        grids |= {(scheme, way): rates if scheme != "none" else rates[:1] for way, rates in ways.items()}
    best = choose(results, grids)
    # A step with QAS is that of fp32, so the best rate is there or next to it.
    slow: dict[tuple[str, Way], tuple[float, ...]] = {}
    for scheme in STUDY.backbone.schemes:
        at = RATES.index(best[scheme, "qas"])
        slow[scheme, "fp32"] = RATES[max(0, at - 1) : at + 2] if scheme != "none" else RATES[:1]
    best |= choose(results, slow)
    results.find([(scheme, way, rate, 1) for (scheme, way), rate in best.items()])
    for (scheme, way), rate in best.items():
        rows[scheme][way] = {
            "rate": rate,
            "test": [round(test, 2) for _, test in results.of(scheme, way, rate)],
            "grid": {f"{each:g}": results.of(scheme, way, each) for each in (grids | slow)[scheme, way]},
        }
    return {"upright": round(STUDY.upright, 2), "schemes": rows}


def choose(results: Results, grids: Mapping[tuple[str, Way], tuple[float, ...]]) -> dict[tuple[str, Way], float]:
    """The rate of each scheme and way that is best for the first seed, on the images to choose by."""
    results.find([(scheme, way, rate, 0) for (scheme, way), rates in grids.items() for rate in rates])
    return {
        (scheme, way): max(rates, key=lambda rate: results.of(scheme, way, rate)[0][0])
        for (scheme, way), rates in grids.items()
    }


def render(result: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = [
        f"# Fine-tuning {result['backbone']} on shifted Fashion-MNIST: update schemes and quantization-aware scaling",
        "",
        f"`{result['command']}` on {result['hardware']}, {result['date']}; {result['duration_s']:.0f} s in all. "
        f"Versions: {', '.join(f'{k} {v}' for k, v in result['versions'].items())}.",
        "",
        f"Upright test images before: {result['upright']} %. Fine-tuned on {IMAGES} shifted images for {EPOCHS} "
        f"epochs, batch 1, rate halved after each third, tested on {TESTS}; means of {result['seeds']} seeds (other "
        "images, other order), the seeds in brackets. 16-bit master weights. Every way has the rate that is best for "
        f"the first seed on {CHOOSING} other shifted images: with QAS of {', '.join(f'{rate:g}' for rate in RATES)}, "
        f"without it of {', '.join(f'{factor:g}' for factor in NO_QAS_FACTORS)} times what makes the median step that "
        "of 0.02, in fp32 of the rate with QAS, the one below and the one above. RAM is all that the program needs, "
        "stack included.",
        "",
        "| scheme | fp32 | integer, QAS | integer, no QAS | QAS less fp32 | no QAS less fp32 | RAM | trained state |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in result["schemes"].items():
        means = {way: float(np.mean(row[way]["test"])) for way in ("fp32", "qas", "no_qas")}
        cells = [
            name,
            *(_cell(row[way]) for way in means),
            *(f"{means[way] - means['fp32']:+.1f}" for way in ("qas", "no_qas")),
            f"{row['total_ram_bytes']:,} B",
            f"{row['trained_state_bytes']:,} B",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join([*lines, ""])


def _cell(way: dict[str, Any]) -> str:
    values = way["test"]
    return f"{np.mean(values):.1f} ({', '.join(f'{value:.1f}' for value in values)}) at {way['rate']:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", choices=list(BACKBONES), default="mcunet-5fps")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pretrain-epochs", type=int, default=4)
    parser.add_argument("--hardware", required=True)
    parser.add_argument("--date", default=datetime.date.today().isoformat())
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "reports")
    parser.add_argument("--work", type=Path, help="what is known so far; runs/device_fashion/... if left out")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    global STUDY
    kind = f"{arguments.backbone}-{arguments.pretrain_epochs}-{arguments.seeds}"
    work = arguments.work or Path("runs") / "device_fashion" / kind
    work.mkdir(parents=True, exist_ok=True)
    STUDY = Study(arguments.backbone, arguments.seeds, arguments.pretrain_epochs, work)
    print(f"upright: {STUDY.upright:.1f} %", file=sys.stderr, flush=True)
    result = run(Results(work / "runs.jsonl", arguments.seeds))
    result |= {
        "command": f"python benchmarks/device_fashion.py --backbone {arguments.backbone} --seeds {arguments.seeds} "
        f"--pretrain-epochs {arguments.pretrain_epochs}",
        "backbone": arguments.backbone,
        "hardware": arguments.hardware,
        "date": arguments.date,
        "seeds": arguments.seeds,
        "duration_s": time.perf_counter() - start,
        "versions": {"python": platform.python_version(), "torch": version("torch"), "numpy": version("numpy")},
    }
    stem = arguments.out / f"device_fashion_{arguments.backbone}_{arguments.hardware}_{arguments.date}"
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    stem.with_suffix(".md").write_text(render(result))
    print(stem.with_suffix(".md"))


if __name__ == "__main__":
    main()

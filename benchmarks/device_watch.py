"""Fine-tuning on a smartwatch: accuracy of the integer arithmetic against fp32, memory, and equality of the back ends.

For each of ten people, `watch-cnn` is trained in fp32 on the nine others and compiled once per update scheme. The
host's C engine then fine-tunes it on the first 30 % of each of the person's recordings, one window at a time, and is
tested on the rest with a gap of 2 windows. The same fine-tuning in fp32 with PyTorch runs beside it. The learning
rates were chosen with fp32 (see the report) and are the same for both.

    python benchmarks/device_watch.py --seeds 2 --hardware 2core_x86 --date 2026-11-21
"""

import argparse
import datetime
import json
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from efftrain.data.watch import PEOPLE, Standardizer, load_watch
from efftrain.models.watch_cnn import WatchCNN
from efftrain.ondevice import Program, compile
from efftrain.ondevice.constants import ConvConstants

SCHEMES = {"none": 0.04, "bias_only": 0.04, "last_layer": 0.04, "sparse": 0.04, "full": 0.02}
"""Learning rate of each, from fp32 alone."""
EPOCHS = 15
PRETRAIN = {"epochs": 12, "lr": 0.02, "momentum": 0.9, "batch": 32, "seed": 0}
STUDY = {"none": 82.8, "bias_only": 90.4, "last_layer": 92.4, "sparse": 94.2, "full": 96.1}
"""What the study before the compiler found for the same arithmetic, 10 people x 2 seeds."""
BARS = {"sparse": 94.0, "full": 95.0}
BOARD = "stm32f746"


class Person:
    """The data of one held-out person, and the model that has never seen it."""

    def __init__(self, person: int) -> None:
        data = load_watch()
        others = data.select([p for p in PEOPLE if p != person])
        scale = Standardizer.fit(others.inputs)
        self.source = scale.apply(others.inputs)
        tune, test = data.select(person, "first30"), data.select(person, "rest70")
        self.tune, self.tune_labels = scale.apply(tune.inputs), np.asarray(tune.targets)
        self.test, self.test_labels = scale.apply(test.inputs), np.asarray(test.targets)
        self.model = pretrain(self.source, np.asarray(others.targets))

    def program(self, scheme: str) -> Program:
        """Compiled for the board."""
        return compile(
            self.model,
            torch.zeros(1, 6, 128),
            scheme=scheme,
            board=BOARD,
            calibration=self.source[::9],
            learning_rate=SCHEMES[scheme],
            seed=1,
        )


def pretrain(inputs: np.ndarray, labels: np.ndarray) -> nn.Module:
    torch.manual_seed(PRETRAIN["seed"])
    model = WatchCNN()
    optimizer = torch.optim.SGD(model.parameters(), PRETRAIN["lr"], momentum=PRETRAIN["momentum"])
    x, y = torch.from_numpy(inputs), torch.from_numpy(labels)
    batch = int(PRETRAIN["batch"])
    for _ in range(int(PRETRAIN["epochs"])):
        order = torch.randperm(len(x))
        for start in range(0, len(x), batch):
            index = order[start : start + batch]
            optimizer.zero_grad()
            F.cross_entropy(model(x[index]), y[index]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return model.eval()


def fine_tune_integer(program: Program, person: Person, seed: int) -> float:
    engine = program.host(seed=seed + 1)
    samples, test = program.quantize_input(person.tune), program.quantize_input(person.test)
    rng = np.random.default_rng(seed)
    if program.scheme.name != "none":
        for epoch in range(EPOCHS):
            engine.set_lr_shift(3 * epoch // EPOCHS)
            engine.train(samples, person.tune_labels, rng.permutation(len(samples)))
    return 100 * engine.evaluate(test, person.test_labels)


def fine_tune_float(program: Program, person: Person, seed: int, learning_rate: float) -> float:
    model = WatchCNN()
    model.load_state_dict(person.model.state_dict())
    trained: list[tuple[nn.Parameter, int | None]] = []
    for layer in (c for c in program.layers.values() if isinstance(c, ConvConstants)):
        module = model.get_submodule(layer.name)
        learns = program.trained[layer.name]
        if learns.bias:
            trained.append((module.get_parameter("bias"), None))
        if learns.channels:
            trained.append((module.get_parameter("weight"), learns.channels))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter, _ in trained:
        parameter.requires_grad_(True)
    x, y = torch.from_numpy(person.tune), torch.from_numpy(person.tune_labels)
    rng = np.random.default_rng(seed)
    for epoch in range(EPOCHS if trained else 0):
        rate = learning_rate * 0.5 ** (3 * epoch // EPOCHS)
        for index in rng.permutation(len(x)).tolist():
            loss = F.cross_entropy(model(x[index : index + 1]), y[index : index + 1])
            gradients = torch.autograd.grad(loss, [parameter for parameter, _ in trained])
            with torch.no_grad():
                for (parameter, channels), gradient in zip(trained, gradients, strict=True):
                    if channels is None:
                        parameter.sub_(rate * gradient)
                    else:
                        parameter[:, :channels].sub_(rate * gradient[:, :channels])
    with torch.no_grad():
        predicted = model(torch.from_numpy(person.test)).argmax(1).numpy()
    return float(100 * (predicted == person.test_labels).mean())


def compare_back_ends(program: Program, person: Person, steps: int = 100) -> dict[str, Any]:
    """The same steps everywhere: hashes, time a step, memory and instructions."""
    samples = program.quantize_input(person.tune)
    order = np.arange(steps) % len(samples)
    result: dict[str, Any] = {"steps": steps, "sha256": {}, "ms_per_step": {}}
    engines = {
        "simulator": program.simulator(),
        "host": program.host(),
        "board m7": program.board("m7"),
        "board m4": program.board("m4"),
    }
    for name, engine in engines.items():
        start = time.perf_counter()
        engine.train(samples, person.tune_labels, order)
        result["ms_per_step"][name] = round(1000 * (time.perf_counter() - start) / steps, 3)
        result["sha256"][name] = engine.state_sha256()
    board = program.board("m7")
    result["instructions_per_step"] = board.count_instructions(samples[0], int(person.tune_labels[0]))
    result["instructions_forward"] = board.count_instructions(samples[0])
    board.train(samples, person.tune_labels, order)
    result["measured_ram_bytes"] = board.measured_ram_bytes
    result["measured_stack_bytes"] = board.measured_stack_bytes
    result["stack_bound_bytes"] = board.firmware.stack_bound_bytes
    result["flash_bytes"] = board.firmware.flash_bytes
    result["toolchain"] = board.firmware.toolchain
    result["equal"] = len(set(result["sha256"].values())) == 1
    plan = program.plan.to_dict()
    result["plan"] = {key: value for key, value in plan.items() if isinstance(value, int)}
    return result


def run(seeds: int, people: list[int], floats: bool) -> dict[str, Any]:
    integer = {scheme: np.zeros((seeds, len(people))) for scheme in SCHEMES}
    reference = {scheme: np.zeros((seeds, len(people))) for scheme in SCHEMES}
    equality: dict[str, Any] = {}
    for column, number in enumerate(people):
        start = time.perf_counter()
        person = Person(number)
        for scheme, learning_rate in SCHEMES.items():
            program = person.program(scheme)
            for seed in range(seeds):
                integer[scheme][seed, column] = fine_tune_integer(program, person, seed)
                if floats:
                    reference[scheme][seed, column] = fine_tune_float(program, person, seed, learning_rate)
            if column == 0:
                equality[scheme] = compare_back_ends(program, person)
                start_float = time.perf_counter()
                if floats and scheme != "none":
                    fine_tune_float(program, person, 0, learning_rate)
                num_steps = EPOCHS * len(person.tune)
                float_ms = (
                    1000 * (time.perf_counter() - start_float) / num_steps if floats and scheme != "none" else None
                )
                equality[scheme]["ms_per_step"]["torch fp32"] = None if float_ms is None else round(float_ms, 3)
        done = ", ".join(f"{scheme} {integer[scheme][:, column].mean():.1f}" for scheme in SCHEMES)
        print(f"person {number}: {done} ({time.perf_counter() - start:.0f} s)", file=sys.stderr, flush=True)
    accuracy = {
        scheme: {
            "integer": _summary(integer[scheme]),
            "fp32": _summary(reference[scheme]) if floats else None,
            "study": STUDY[scheme],
            "bar": BARS.get(scheme),
        }
        for scheme in SCHEMES
    }
    return {"accuracy": accuracy, "back_ends": equality}


def _summary(values: np.ndarray) -> dict[str, Any]:
    return {
        "mean": round(float(values.mean()), 2),
        "by_seed": np.round(values.mean(1), 2).tolist(),
        "worst_person": round(float(values.mean(0).min()), 1),
        "by_person": np.round(values.mean(0), 1).tolist(),
    }


def render(result: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = [
        "# Fine-tuning watch-cnn on the watch: accuracy, memory, equality",
        "",
        f"`{result['command']}` on {result['hardware']}, {result['date']}; {result['duration_s']:.0f} s in all.",
        "",
        f"Versions: {', '.join(f'{k} {v}' for k, v in result['versions'].items())}.",
        f"Setting: leave one person out, people {result['people']}, {result['seeds']} seeds (the order of the "
        f"windows), batch 1, "
        f"{EPOCHS} epochs, learning rate halved after each third; pretraining {json.dumps(PRETRAIN)}, once per person.",
        "int16 gradients, int16 master weights, nearest rounding; the engine is the generated C on the host.",
        "",
        "## Accuracy on the held-out person (%)",
        "",
        "| scheme | lr | integer | by seed | worst person | fp32, same run | by seed | difference | study | bar |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for scheme, row in result["accuracy"].items():
        whole, real = row["integer"], row["fp32"]
        fp32 = [real["mean"], real["by_seed"], f"{whole['mean'] - real['mean']:+.2f}"] if real else ["", "", ""]
        bar = "" if row["bar"] is None else f">= {row['bar']} {'reached' if whole['mean'] >= row['bar'] else 'MISSED'}"
        cells = [
            scheme,
            SCHEMES[scheme],
            whole["mean"],
            whole["by_seed"],
            whole["worst_person"],
            *fp32,
            row["study"],
            bar,
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += [
        "",
        "## RAM by part (bytes, planned; the linker and the emulator hold the program to it)",
        "",
        "| scheme | arena | its lower bound | trained state | scratch | stack | static | **all** | measured, "
        "stack as touched "
        "| stack touched | stack bound |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for scheme, row in result["back_ends"].items():
        plan = row["plan"]
        cells = [scheme, plan["arena_bytes"], plan["arena_lower_bound_bytes"], plan["trained_state_bytes"]]
        cells += [plan["scratch_bytes"], plan["stack_bytes"], plan["static_bytes"], f"**{plan['total_ram_bytes']}**"]
        cells += [row["measured_ram_bytes"], row["measured_stack_bytes"], row["stack_bound_bytes"]]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += [
        "",
        "The stack is reserved; `stack bound` is the sum of the largest frames along the chain of calls from "
        "the compiler's "
        "stack usage, `stack touched` the emulator's watermark. Scratch lies inside the arena.",
        "",
        "## Cost of a step",
        "",
        "| scheme | flash planned | flash linked | MACs forward | MACs backward | instructions, step | "
        "instructions, forward "
        "| ms: simulator | host | unicorn M7 | unicorn M4 | torch fp32 eager |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for scheme, row in result["back_ends"].items():
        plan, ms = row["plan"], row["ms_per_step"]
        cells = [scheme, plan["flash_bytes"], row["flash_bytes"], plan["macs_forward"], plan["macs_backward"]]
        cells += [row["instructions_per_step"], row["instructions_forward"], *ms.values()]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += [
        "",
        f"## Equality after {next(iter(result['back_ends'].values()))['steps']} steps (SHA-256 of the trained state)",
        "",
        "| scheme | simulator | host | board m7 | board m4 | equal |",
        "|---|---|---|---|---|---|",
    ]
    for scheme, row in result["back_ends"].items():
        lines.append(
            f"| {scheme} | " + " | ".join(f"`{h[:16]}`" for h in row["sha256"].values()) + f" | {row['equal']} |"
        )
    return "\n".join([*lines, ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--people", type=int, nargs="*", default=list(PEOPLE))
    parser.add_argument("--no-fp32", action="store_true", help="leave the fp32 reference out")
    parser.add_argument("--hardware", default=f"{platform.machine()}")
    parser.add_argument("--date", default=datetime.date.today().isoformat())
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "reports")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    result = run(options.seeds, options.people, not options.no_fp32)
    result |= {
        "command": "python benchmarks/device_watch.py " + " ".join(sys.argv[1:]),
        "hardware": options.hardware,
        "date": options.date,
        "seeds": options.seeds,
        "people": options.people,
        "duration_s": round(time.perf_counter() - start, 1),
        "config": {"learning_rates": SCHEMES, "epochs": EPOCHS, "pretrain": PRETRAIN, "board": BOARD},
        "versions": {"python": platform.python_version(), **{p: version(p) for p in ("torch", "numpy", "unicorn")}},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / f"device_watch_{options.hardware}_{options.date}"
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    report = render(result)
    stem.with_suffix(".md").write_text(report)
    print(report)
    missed = [s for s, bar in BARS.items() if result["accuracy"][s]["integer"]["mean"] < bar]
    unequal = [s for s, row in result["back_ends"].items() if not row["equal"]]
    for problem in (*(f"{s}: below its bar" for s in missed), *(f"{s}: back ends differ" for s in unequal)):
        print(f"FAILED: {problem}", file=sys.stderr)
    return 1 if missed or unequal else 0


if __name__ == "__main__":
    sys.exit(main())

"""MCUNet-5fps with its published schemes on an emulated board, a board for every model, and the host's speed.

Three parts, each of which can be run alone and is kept in one report:

- mcunet: RAM by part, instructions, flash and equality of simulator, host, unicorn and QEMU for each published scheme.
  The emulated board has just the RAM of the plan, to the next 4 KiB. Beside it, what the reference system needs.
- boards: plans of all shipped models and the usual schemes, and the smallest shipped board for each.
- speed: a step of the generated C on this machine against the same step in PyTorch eager, one thread, in turns.

    python benchmarks/device_mcunet.py --hardware 2core_x86 --date 2026-11-21 [--part speed]
"""

import argparse
import datetime
import json
import os
import platform
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.nn import functional as F

from efftrain.errors import ConfigError
from efftrain.models import build_model
from efftrain.ondevice import Board, Program, Scheme, compile
from efftrain.ondevice.backends.qemu import QemuEngine
from efftrain.ondevice.constants import ConvConstants, Loss
from efftrain.ondevice.fitting import on_smallest_board, unlimited
from efftrain.ondevice.ir import ChannelTiles
from efftrain.ondevice.memory import MemoryPlan
from efftrain.ondevice.scheme import PUBLISHED
from efftrain.ondevice.waterfall import waterfall

Rounding = Literal["master", "stochastic"]

REFERENCE = {
    "source": "tinyengine commit 47bb283, scheme 49kb, arm-none-eabi-gcc 12.2.1 -Ofast (hard float), "
    "qemu-system-arm 7.2.22 mps2-an500 -icount shift=0",
    "total_ram_bytes": 255_384,
    "arena_bytes": 180_224,
    "arena_lower_bound_bytes": 163_840,
    "stack_bytes": 21_856,
    "flash_bytes": 693_256,
    "instructions_per_step": 103_935_744,
    "instructions_forward": 63_329_960,
}
"""Measured, not planned, of the system that published the schemes."""


@dataclass(frozen=True)
class Case:
    """A scheme, and how it is run."""

    scheme: str
    rounding: Rounding = "stochastic"
    in_place: bool = False
    """Samples are read where they are."""
    steps: int = 10
    """Whose bits are compared."""
    ram_bytes: int | None = None
    """Of the board, where it is to be less than what the plan takes by itself."""


CASES = [
    Case("mcunetv3-49kb", steps=100),
    Case("mcunetv3-49kb", in_place=True, steps=100),
    Case("mcunetv3-49kb", in_place=True, steps=100, ram_bytes=65_536),
    Case("mcunetv3-49kb", rounding="master", steps=100),
    *[Case(name) for name in PUBLISHED if name != "mcunetv3-49kb"],
]

MODELS = (
    *("watch-cnn", "fashion-cnn", "resnet8", "ds-cnn", "mobilenet-v1-0.25", "fc-autoencoder"),
    *("mcunet-5fps", "mobilenet-v2-w0.35", "proxyless-w0.3"),
)
SCHEMES = ("bias_only", "last_layer", "last_k=3", "sparse", "full")
SPEED = (
    ("watch-cnn", "full"),
    ("watch-cnn", "sparse"),
    ("ds-cnn", "full"),
    ("ds-cnn", "last_k=3"),
    ("resnet8", "full"),
)
ROUNDS, LEARNING_RATE, SEED = 15, 0.001, 0


def compiled(
    model: nn.Module,
    scheme: str,
    board: Board,
    rounding: Rounding = "stochastic",
    in_place: bool = False,
    must_fit: bool = True,
) -> Program:
    return compile(
        model,
        torch.zeros(1, *shape_of(model)),
        scheme=scheme,
        board=board,
        calibration=noise(model, 16),
        learning_rate=LEARNING_RATE,
        seed=SEED,
        rounding=rounding,
        loss=cast("Loss", getattr(model, "loss", "cross_entropy")),
        copy_input=not in_place,
        must_fit=must_fit,
    )


def fresh(name: str) -> nn.Module:
    """Weights from the seed: memory, instructions and equality do not depend on them."""
    torch.manual_seed(SEED)
    return build_model(name, **({"num_classes": 10} if name == "mcunet-5fps" else {})).eval()


def shape_of(model: nn.Module) -> tuple[int, ...]:
    return cast("tuple[int, ...]", cast(Any, model).input_shape)


def noise(model: nn.Module, count: int) -> npt.NDArray[np.float32]:
    samples = np.random.default_rng(SEED).normal(size=(count, *shape_of(model))).astype(np.float32)
    return samples.reshape(*samples.shape, 1, 1) if samples.ndim == 2 else samples


# --- mcunet -----------------------------------------------------------------------------------------------------------


def run_mcunet() -> dict[str, Any]:
    model = fresh("mcunet-5fps")
    board = Board.named("stm32f746")
    rows = []
    for case in CASES:
        start = time.perf_counter()
        target = replace(board, ram_bytes=case.ram_bytes or board.ram_bytes)
        program = compiled(model, case.scheme, target, case.rounding, case.in_place)
        compile_s = time.perf_counter() - start
        row = {"scheme": case.scheme, "rounding": case.rounding, "input_in_place": case.in_place, "steps": case.steps}
        row["tiled"] = [op.name for op in program.graph.ops if isinstance(op, ChannelTiles)]
        row |= {"compile_s": round(compile_s, 1), **measured(program, noise(model, case.steps), case.steps)}
        if case is CASES[0]:
            row["waterfall"] = [step.to_dict() for step in waterfall(program, LEARNING_RATE)]
        rows.append(row)
        done = {key: row[key] for key in ("scheme", "rounding", "total_ram_bytes", "measured_ram_bytes", "bit_equal")}
        print(f"{done} ({time.perf_counter() - start:.0f} s)", file=sys.stderr, flush=True)
    return {"reference": REFERENCE, "rows": rows}


def measured(program: Program, samples: npt.NDArray[np.float32], steps: int) -> dict[str, Any]:
    """On a board with the RAM of the plan and no more: what is touched, counted and learned."""
    plan = program.plan
    tight = replace(program.target, ram_bytes=-(-plan.total_ram_bytes // 4096) * 4096)
    program = replace(program, target=tight)
    xs = program.quantize_input(samples)
    labels = np.random.default_rng(SEED).integers(program.num_classes, size=steps)
    order = np.arange(steps)
    hashes, ms = {}, {}
    unicorn, qemu = program.board("m7"), QemuEngine.of(program, "m7")
    engines = {"simulator": program.simulator(), "host": program.host(), "unicorn-m7": unicorn, "qemu-m7": qemu}
    for name, engine in engines.items():
        start = time.perf_counter()
        engine.train(xs, labels, order)
        ms[name] = round(1000 * (time.perf_counter() - start) / steps, 2)
        hashes[name] = engine.state_sha256()
    counter = QemuEngine.of(program, "m7")
    return {
        **{key: value for key, value in plan.to_dict().items() if isinstance(value, int)},
        "enforced_ram_bytes": tight.ram_bytes,
        "measured_ram_bytes": qemu.measured_ram_bytes,
        "measured_stack_bytes": qemu.measured_stack_bytes,
        "measured_ram_bytes_unicorn": unicorn.measured_ram_bytes,
        "measured_stack_bytes_unicorn": unicorn.measured_stack_bytes,
        "stack_bound_bytes": unicorn.firmware.stack_bound_bytes,
        "linked_flash_bytes": unicorn.firmware.flash_bytes,
        "toolchain": unicorn.firmware.toolchain,
        "instructions_forward": counter.count_instructions(xs[0]),
        "instructions_per_step": counter.count_instructions(xs[0], int(labels[0])),
        "sha256": hashes,
        "bit_equal": len(set(hashes.values())) == 1,
        "ms_per_step": ms,
    }


# --- boards -----------------------------------------------------------------------------------------------------------


def run_boards() -> dict[str, Any]:
    rows = []
    for name in MODELS:
        model = fresh(name)
        for scheme in (*SCHEMES, *(PUBLISHED if name == "mcunet-5fps" else ())):
            try:
                Scheme.parse(scheme)
                program = compiled(model, scheme, unlimited(Board.named("stm32f746")))
            except ConfigError as error:
                rows.append({"model": name, "scheme": scheme, "refused": str(error)})
                continue
            keys = ("total_ram_bytes", "arena_bytes", "arena_gap_bytes", "trained_state_bytes", "flash_bytes")
            row = {key: getattr(program.plan, key) for key in (*keys, "macs_forward", "macs_backward")}
            smallest = on_smallest_board(program, LEARNING_RATE, partial(planned, model, scheme))
            row["smallest_board"] = None if smallest is None else smallest[0].name
            row["smallest_board_ram_bytes"] = None if smallest is None else smallest[1].total_ram_bytes
            rows.append({"model": name, "scheme": scheme, **row})
        print(f"{name}: {len(rows)} plans", file=sys.stderr, flush=True)
    return {"rows": rows}


def planned(model: nn.Module, scheme: str, board: Board) -> MemoryPlan:
    return compiled(model, scheme, board, must_fit=False).plan


# --- speed ------------------------------------------------------------------------------------------------------------


def run_speed() -> dict[str, Any]:
    torch.set_num_threads(1)
    rows = []
    for name, scheme in SPEED:
        model = fresh(name)
        program = compiled(model, scheme, Board.named("nucleo-h743"), "master")
        count = 256 if name == "watch-cnn" else 64
        samples = noise(model, count)
        labels = np.random.default_rng(SEED).integers(program.num_classes, size=count)
        host, eager = program.host(), Eager(model, program)
        xs, order = program.quantize_input(samples), np.arange(count)
        xs_float, labels_torch = torch.from_numpy(samples), torch.from_numpy(labels)
        times: dict[str, list[float]] = {"host": [], "torch": []}
        for number in range(ROUNDS + 2):
            start = time.perf_counter()
            host.train(xs, labels, order)
            middle = time.perf_counter()
            eager.train(xs_float, labels_torch)
            end = time.perf_counter()
            if number >= 2:  # the first two warm up caches and allocators
                times["host"].append((middle - start) / count)
                times["torch"].append((end - middle) / count)
        ratios = sorted(t / h for h, t in zip(times["host"], times["torch"], strict=True))
        rows.append(
            {
                "model": name,
                "scheme": scheme,
                "steps_a_round": count,
                "host_us": round(1e6 * median(times["host"]), 1),
                "torch_us": round(1e6 * median(times["torch"]), 1),
                "ratio": round(median(ratios), 2),
                "ratio_range": [round(ratios[0], 2), round(ratios[-1], 2)],
                "macs": program.plan.macs_forward + program.plan.macs_backward,
            }
        )
        print(rows[-1], file=sys.stderr, flush=True)
    return {"rounds": ROUNDS, "rows": rows}


class Eager:
    """The same parameters trained in PyTorch eager: batch 1, SGD, batch norms folded as the compiler does."""

    def __init__(self, model: nn.Module, program: Program) -> None:
        self.model = fuse(model)
        found = dict(self.model.named_parameters())
        for parameter in found.values():
            parameter.requires_grad_(False)
        self.trained: list[tuple[nn.Parameter, int | None]] = []
        for layer in (c for c in program.layers.values() if isinstance(c, ConvConstants)):
            learns = program.trained.get(layer.name)
            if learns is None:
                continue
            if learns.bias:
                self.trained.append((found[f"{layer.name}.bias"], None))
            if learns.channels:
                self.trained.append((found[f"{layer.name}.weight"], learns.channels))
        for parameter, _ in self.trained:
            parameter.requires_grad_(True)

    def train(self, xs: Tensor, labels: Tensor) -> None:
        """One step a sample."""
        parameters = [parameter for parameter, _ in self.trained]
        for index in range(len(xs)):
            loss = F.cross_entropy(self.model(xs[index : index + 1]), labels[index : index + 1])
            gradients = torch.autograd.grad(loss, parameters)
            with torch.no_grad():
                for (parameter, channels), gradient in zip(self.trained, gradients, strict=True):
                    if channels is None or channels >= parameter.shape[1]:
                        parameter.add_(gradient, alpha=-LEARNING_RATE)
                    else:
                        parameter[:, :channels].add_(gradient[:, :channels], alpha=-LEARNING_RATE)


# --- the report -------------------------------------------------------------------------------------------------------

PARTS = {"mcunet": run_mcunet, "boards": run_boards, "speed": run_speed}


def render(result: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = ["# MCUNet-5fps on an emulated board, a board for every model, and the host's speed", ""]
    for part, run in result["parts"].items():
        load = ", ".join(f"{value:.1f}" for value in run["load_average"])
        lines.append(
            f"- {part}: `{run['command']}`, {run['duration_s']:.0f} s, commit {run['commit']}; load of the machine "
            f"(1 minute) before and after: {load} on {run['num_cpus']} cores."
        )
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    lines += [
        "",
        f"{result['hardware']}, {result['date']}. Versions: {versions}. Seed {SEED}; fresh weights, normal noise",
    ]
    lines[-1] += " as data: memory, instructions and equality do not depend on them."
    if "mcunet" in result:
        lines += render_mcunet(result["mcunet"])
    if "boards" in result:
        lines += render_boards(result["boards"])
    if "speed" in result:
        lines += render_speed(result["speed"], result["parts"]["speed"]["load_average"])
    return "\n".join([*lines, ""])


def sample(row: dict[str, Any]) -> str:
    """Where it lies; and what was done so that the rest fits."""
    return ("in place" if row["input_in_place"] else "in the arena") + (", tiles" if row["tiled"] else "")


def header(columns: str) -> tuple[str, str]:
    return f"| {columns} |", "|---" * (columns.count("|") + 1) + "|"


def render_mcunet(part: dict[str, Any]) -> list[str]:
    rows, reference = part["rows"], part["reference"]
    first = rows[0]
    lines = [
        "",
        "## RAM (bytes): MCUNet-5fps, input 3x128x128, 10 classes, batch 1",
        "",
        *header(
            "scheme | rounding | sample | arena | lower bound | gap | trained state | stack | "
            "static | **all, planned** | enforced | measured: qemu | unicorn | stack touched: qemu | unicorn | bound"
        ),
    ]
    for row in rows:
        cells = [row["scheme"], row["rounding"], sample(row)]
        keys = ("arena_bytes", "arena_lower_bound_bytes", "arena_gap_bytes", "trained_state_bytes", "stack_bytes")
        cells += [f"{row[key]:,}" for key in (*keys, "static_bytes")]
        cells += [f"**{row['total_ram_bytes']:,}**", f"{row['enforced_ram_bytes']:,}", f"{row['measured_ram_bytes']:,}"]
        cells += [f"{row['measured_ram_bytes_unicorn']:,}", f"{row['measured_stack_bytes']:,}"]
        cells += [f"{row['measured_stack_bytes_unicorn']:,}", f"{row['stack_bound_bytes'] or 0:,}"]
        lines.append("| " + " | ".join(cells) + " |")
    gap = reference["arena_bytes"] - reference["arena_lower_bound_bytes"]
    lines.append(
        f"| 49kb, reference system | float | in the arena | {reference['arena_bytes']:,} | "
        f"{reference['arena_lower_bound_bytes']:,} | {gap:,} | | {reference['stack_bytes']:,} | | | | "
        f"**{reference['total_ram_bytes']:,}** | | {reference['stack_bytes']:,} | | |"
    )
    ratio = reference["total_ram_bytes"] / first["total_ram_bytes"]
    lines += [
        "",
        f"Reference: {reference['source']}; measured before, not in this run. Its whole RAM is {ratio:.2f} times "
        "that of the same scheme here. `Enforced` is what linker and emulators allow: unicorn maps no more, QEMU's MPU "
        "ends there. `Measured` counts what the program holds and the stack as deep as it got; the plan reserves the "
        "stack. A sample in place lies in flash or a buffer of its own that is not counted. Tiles: the compiler was "
        "given a board of the enforced RAM, and runs the backward pass of blocks some channels at a time, which takes "
        "more instructions.",
        "",
        "## Instructions and flash",
        "",
        *header(
            "scheme | rounding | sample | instructions a step | "
            "forward | MACs forward | backward | flash, linked | planned"
        ),
    ]
    for row in rows:
        cells = [row["scheme"], row["rounding"], sample(row)]
        counted = ("instructions_per_step", "instructions_forward", "macs_forward", "macs_backward")
        cells += [f"{row[key]:,}" for key in (*counted, "linked_flash_bytes", "flash_bytes")]
        lines.append("| " + " | ".join(cells) + " |")
    lines.append(
        f"| 49kb, reference system | float | in the arena | {reference['instructions_per_step']:,} | "
        f"{reference['instructions_forward']:,} | | | {reference['flash_bytes']:,} | |"
    )
    lines += [
        "",
        f"Counted by qemu-system-arm (mps2-an500, -icount shift=0); {first['toolchain']} -O2, soft float. Instructions "
        "are not cycles.",
        "",
        "## Equality (SHA-256 of the trained state) and time on this machine",
        "",
        *header(
            "scheme | rounding | sample | steps | equal | simulator | "
            "host | unicorn-m7 | qemu-m7 | ms a step: simulator | host | unicorn | qemu"
        ),
    ]
    for row in rows:
        cells = [row["scheme"], row["rounding"], sample(row)]
        cells += [str(row["steps"]), str(row["bit_equal"]), *(f"`{h[:12]}`" for h in row["sha256"].values())]
        lines.append("| " + " | ".join([*cells, *(f"{ms:g}" for ms in row["ms_per_step"].values())]) + " |")
    lines += [
        "",
        f"## What each pass saves ({first['scheme']}, {first['rounding']}), bytes",
        "",
        *header(
            "passes, cumulative | ops | max live forward | max live backward | "
            "arena | lower bound | trained state | RAM in all"
        ),
    ]
    for step in first["waterfall"]:
        cells = [f"{value:,}" if isinstance(value, int) else value for value in step.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def render_boards(part: dict[str, Any]) -> list[str]:
    lines = [
        "",
        "## The smallest shipped board for every model and scheme (stochastic rounding, planned)",
        "",
        *header(
            "model | scheme | RAM in all | arena | gap | "
            "trained state | flash | MACs forward | backward | smallest board: RAM there"
        ),
    ]
    for row in part["rows"]:
        if "refused" in row:
            lines.append(f"| {row['model']} | {row['scheme']} | refused: {row['refused']} | | | | | | | |")
            continue
        keys = ("total_ram_bytes", "arena_bytes", "arena_gap_bytes", "trained_state_bytes", "flash_bytes")
        cells = [row["model"], row["scheme"], *(f"{row[key]:,}" for key in (*keys, "macs_forward", "macs_backward"))]
        on_board = "none"
        if row["smallest_board"]:
            on_board = f"{row['smallest_board']}: {row['smallest_board_ram_bytes']:,}"
        lines.append("| " + " | ".join([*cells, on_board]) + " |")
    shipped = "; ".join(f"{b.name} {b.ram_bytes // 1024} KiB" for b in map(Board.named, Board.names()))
    note = "RAM in all is with nothing in tiles; where a board has less, gradients are taken some channels at a time."
    return [*lines, "", f"Boards, RAM: {shipped}. {note}"]


def render_speed(part: dict[str, Any], load: list[float]) -> list[str]:
    lines = [
        "",
        "## A step of the generated C on this machine against PyTorch eager (batch 1, one thread, SGD)",
        "",
        *header("model | scheme | C, us | eager, us | eager / C, median | range | goal 5 | MACs a step"),
    ]
    for row in part["rows"]:
        low, high = row["ratio_range"]
        cells = [
            row["model"],
            row["scheme"],
            row["host_us"],
            row["torch_us"],
            f"**{row['ratio']}**",
            f"{low} to {high}",
            "reached" if row["ratio"] >= 5 else "MISSED",
        ]
        lines.append("| " + " | ".join(map(str, [*cells, f"{row['macs']:,}"])) + " |")
    note = (
        f"Both in turns, {part['rounds']} rounds after two to warm up, each ratio from the two halves of one round. "
        "Eager trains the same parameters of the same module with its batch norms folded."
    )
    if max(load) > 1:
        note += (
            " Other work ran on the machine at the same time: it slows both halves of a round, but at a load "
            "far above the cores not evenly: then trust the range, not the median."
        )
    return [*lines, "", note]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=tuple(PARTS), action="append", help="only these, the others as they were")
    parser.add_argument("--hardware", default=platform.machine())
    parser.add_argument("--date", default=datetime.date.today().isoformat())
    parser.add_argument("--commit", default="unknown", help="of the code that runs, for the report")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "reports")
    options = parser.parse_args()
    torch.set_num_threads(1)
    stem = options.out / f"device_mcunet_{options.hardware}_{options.date}"
    options.out.mkdir(parents=True, exist_ok=True)
    path = stem.with_suffix(".json")
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() and options.part else {"parts": {}}
    names = ("torch", "numpy", "unicorn")
    result |= {
        "hardware": options.hardware,
        "date": options.date,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in names}},
    }
    for part in options.part or PARTS:
        start, load = time.perf_counter(), os.getloadavg()[0]
        result[part] = PARTS[part]()
        result["parts"][part] = {
            "command": f"python benchmarks/device_mcunet.py --part {part}",
            "commit": options.commit,
            "duration_s": round(time.perf_counter() - start, 1),
            "load_average": [round(load, 2), round(os.getloadavg()[0], 2)],
            "num_cpus": os.cpu_count(),
        }
        path.write_text(json.dumps(result, indent=1) + "\n")
        stem.with_suffix(".md").write_text(render(result))
    print(render(result))
    unequal = [row["scheme"] for row in result.get("mcunet", {}).get("rows", []) if not row["bit_equal"]]
    for scheme in unequal:
        print(f"{scheme}: back ends differ", file=sys.stderr)
    return 1 if unequal else 0


if __name__ == "__main__":
    sys.exit(main())

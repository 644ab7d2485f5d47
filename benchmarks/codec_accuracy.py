"""Codec x task: does a model learn as much with compressed gradients as without, over seeds, and for how many bytes?

Every mode of a task has the weights, batches, steps, optimizer and schedule of the uncompressed control of the same
seed. What differs is what gradients go through, and what ``Mode.changes`` says: a sparse codec wants clipping in front
of it. Learning rate and clipping of the control were tuned, too (settings tried).

    torchrun --nproc-per-node 2 benchmarks/codec_accuracy.py                          # the table
    torchrun --nproc-per-node 2 benchmarks/codec_accuracy.py --tasks watch --seeds 2  # a part of it
    torchrun --nproc-per-node 2 benchmarks/codec_accuracy.py --try settings.jsonl     # one run a line

The last form is how settings are chosen: with other seeds, on data that neither trains nor tests. A line is
``{"task": "watch", "codec": "TopK(0.01) >> Sign()", "plan": {}, "changes": {"epochs": 20}}``; its result is appended to
``codec_accuracy_tried.jsonl``, which the report lists.
"""

import argparse
import datetime
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

import numpy as np
import torch

from efftrain.compression import parse_codec
from efftrain.data import Dataset, load_dataset
from efftrain.data.watch import PEOPLE, Span, load_watch, standardize, watch_split
from efftrain.errors import NonFiniteError
from efftrain.models import build_model
from efftrain.parallel import Plan, mesh
from efftrain.parallel.sync import SyncConfig
from efftrain.report.run import environment, write_atomic
from efftrain.training import LoopConfig, OptimizerConfig, StepConfig, fit, set_seed

HERE = Path(__file__).parent
COMMAND = "torchrun --nproc-per-node 2 benchmarks/codec_accuracy.py"
TRIED = HERE / "reports" / "codec_accuracy_tried.jsonl"
FIRST_TRIAL_SEED = 100
"""Seeds of trials start here, so that none is among the reported ones."""

Split = Literal["test", "validation"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is learned, and for how long."""

    model: str
    model_options: dict[str, int] = field(default_factory=dict)
    data: str
    num_train: int | None = None
    """Samples of the training split, drawn once for all seeds; ``None`` takes all that validation leaves."""
    num_judged: int = 10_000
    """Samples of test or validation, drawn likewise."""
    epochs: int = 1
    batch_size: int
    optimizer: OptimizerConfig
    clip_norm: float | None = None
    judged_by: Literal["accuracy", "loss"] = "accuracy"


@dataclass(frozen=True, kw_only=True)
class Mode:
    """What gradients go through."""

    codec: str = "Identity()"
    plan: dict[str, Any] = field(default_factory=dict)
    """Other fields of ``Plan``; ``sync`` holds those of ``SyncConfig``."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Fields of ``Task`` that differ from the control's; ``optimizer`` holds those of ``OptimizerConfig``."""


TASKS = {
    "watch": Task(model="watch-cnn", data="watch", epochs=40, batch_size=32, optimizer=OptimizerConfig(lr=0.04)),
    "fashion": Task(
        model="fashion-cnn", data="fashion-mnist", epochs=2, batch_size=128, optimizer=OptimizerConfig(lr=0.05)
    ),
    "char": Task(
        model="char-transformer",
        model_options={"width": 64, "depth": 2, "heads": 4, "context": 64},
        data="pytext",
        num_train=8 * 800,
        num_judged=2048,
        batch_size=8,
        optimizer=OptimizerConfig(lr=0.5, warmup_steps=50),
        clip_norm=0.4,
        judged_by="loss",
    ),
}

CONTROL, SPARSE = "control", ">= 100x"
CORRECTED = {"momentum_correction": True}
WHOLE = {"whole_buckets": True}
SPARSE_MODES = {
    "watch": Mode(codec="TopK(0.026) >> IntN(4)", plan={**CORRECTED, "sync": WHOLE}),
    "fashion": Mode(codec="TopK(0.027) >> IntN(4)", plan={**CORRECTED, "sync": WHOLE}),
    "char": Mode(
        codec="TopK(0.027) >> IntN(4)",
        plan={**CORRECTED, "sync": {**WHOLE, "masking": True, "local_clip": 1.5}},
        changes={"clip_norm": None},
    ),
}
OTHER_MODES = {
    "Int8": Mode(codec="Int8()"),
    "IntN(4)": Mode(codec="IntN(4)"),
    "Sign": Mode(codec="Sign()"),
    "TopK 1 %, Int8": Mode(codec="TopK(0.01) >> Int8()"),
}


class Part:
    """Some samples of a data set."""

    def __init__(self, data: Dataset, indices: np.ndarray) -> None:
        self._data, self._indices = data, indices
        self.num_classes: int = getattr(data, "num_classes", 0)

    def __len__(self) -> int:
        return len(self._indices)

    def batch(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See ``efftrain.data.Dataset``."""
        return self._data.batch(self._indices[indices])


def data_of(task: Task, split: Split) -> tuple[Dataset, Dataset]:
    """What is trained on and what is judged by. Validation data is in neither training nor test data."""
    if task.data == "watch":
        options: dict[str, Any] = {"people": 8, "train_share": 0.2}
        train = watch_split("train", **options)
        if split == "test":
            return train, watch_split("test", **options)
        _, by = standardize(load_watch().select(PEOPLE[:8], span=Span(0.0, 0.2)))
        return train, standardize(load_watch().select(PEOPLE[:8], span=Span(0.3, 0.7)), by)[0]
    options = {"context": task.model_options["context"]} if task.data == "pytext" else {}
    whole = load_dataset(task.data, "train", **options)
    order = np.random.default_rng(0).permutation(len(whole))
    rest, validation = order[: -task.num_judged], order[-task.num_judged :]
    chosen = Part(whole, rest[: task.num_train])
    if split == "validation":
        return chosen, Part(whole, validation)
    test = load_dataset(task.data, "test", **options)
    return chosen, Part(test, np.random.default_rng(0).permutation(len(test))[: task.num_judged])


def changed(task: Task, changes: dict[str, Any]) -> Task:
    """The task with other fields; those of ``optimizer`` one by one."""
    optimizer = replace(task.optimizer, **changes.get("optimizer", {}))
    return replace(task, **{**changes, "optimizer": optimizer})


def run(task: Task, mode: Mode, seed: int, split: Split) -> dict[str, Any]:
    """One training run, on every rank; its figures."""
    task = changed(task, mode.changes)
    train, judged = data_of(task, split)
    set_seed(seed, 0, deterministic=True)  # equal weights on all ranks and in all modes
    model = build_model(task.model, **task.model_options)
    settings = dict(mode.plan)
    sync = SyncConfig(**settings.pop("sync", {}))
    plan = Plan(codec=parse_codec(mode.codec), sync=sync, **settings)
    config = LoopConfig(epochs=task.epochs, batch_size=task.batch_size, eval_every=0, checkpoint_every=0)
    job = plan.apply(
        model,
        optimizer=task.optimizer,
        step=StepConfig(clip_norm=task.clip_norm),
        seed=seed,
    )
    set_seed(seed, mesh.rank(), deterministic=True)
    losses: list[float] = []
    result = fit(job, train, judged, config, seed=seed, on_step=lambda _, step: losses.append(step.loss))
    uncompressed_bytes = result.totals["uncompressed_bytes"]
    return {
        "accuracy": result.evaluation.accuracy,
        "loss": result.evaluation.loss,
        "train_loss": mean(losses[-50:]),
        "compression": uncompressed_bytes / result.totals["wire_bytes"],
        "num_steps": result.num_steps,
        "num_skipped": result.num_skipped,
        "train_s": result.train_s,
    }


def trials(path: Path, *, first: bool) -> None:
    """Run every line of a file on validation data; rank 0 appends the results to ``TRIED``."""
    figures: dict[str, Any]
    for line in path.read_text(encoding="utf-8").splitlines():
        trial: dict[str, Any] = json.loads(line)
        mode = Mode(**{key: trial[key] for key in ("codec", "plan", "changes") if key in trial})
        seed = trial.setdefault("seed", FIRST_TRIAL_SEED)
        try:
            figures = run(TASKS[trial["task"]], mode, seed, "validation")
        except NonFiniteError as error:  # raised on all ranks
            figures = {"failed": str(error)}
        if first:
            print(line, figures, file=sys.stderr, flush=True)
            with TRIED.open("a", encoding="utf-8") as tried:
                tried.write(json.dumps({**trial, **figures}) + "\n")


def table(tasks: list[str], num_seeds: int, num_other_seeds: int) -> Iterable[tuple[str, str, int]]:
    """Task, mode and seed of every run: what the verdicts need first, the other codecs after it."""
    for task in tasks:
        yield from ((task, mode, seed) for seed in range(num_seeds) for mode in (CONTROL, SPARSE))
    for seed in range(num_other_seeds):
        yield from ((task, mode, seed) for task in tasks for mode in OTHER_MODES)


def mode_of(task: str, mode: str) -> Mode:
    """The mode of this name for this task."""
    return {CONTROL: Mode(), SPARSE: SPARSE_MODES[task], **OTHER_MODES}[mode]


def cell(task: str, mode: str, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The figures of one cell of the table, from the runs of its task.

    ``difference`` is the mean over the seeds that both have, ours minus the control's, positive where ours is better;
    ``spread`` is largest minus smallest of all seeds of the control.
    """
    by, better = TASKS[task].judged_by, 1 if TASKS[task].judged_by == "accuracy" else -1
    control, ours = [run[by] for run in runs[CONTROL]], [run[by] for run in runs[mode]]
    pairs = [better * (a - b) for a, b in zip(ours, control, strict=False)]
    spread, compression = max(control) - min(control), mean(run["compression"] for run in runs[mode])
    return {
        **asdict(mode_of(task, mode)),
        "judged_by": by,
        "values": ours,
        "mean": mean(ours),
        "spread": max(ours) - min(ours),
        "difference": mean(pairs),
        "difference_std": stdev(pairs) if len(pairs) > 1 else None,
        "control_spread": spread,
        "compression": compression,
        "within_spread": mean(pairs) >= -spread,
        "runs": runs[mode],
    }


def verdict(name: str, figures: dict[str, Any]) -> str:
    """What a cell shows, in words."""
    if name == CONTROL:
        return "control"
    pairs, deviation = len(figures["values"]), figures["difference_std"] or 0.0
    if not figures["within_spread"]:
        return "worse"
    if pairs > 2 and figures["difference"] < -2 * deviation / math.sqrt(pairs):
        return "within the spread, but below the control by more than two standard errors"
    return "within the spread"


def claims(cells: dict[str, dict[str, Any]]) -> dict[str, bool]:
    """What was to be shown, and whether it was."""
    shown = {}
    for task, modes in cells.items():
        if SPARSE in modes:
            sparse = modes[SPARSE]
            num_seeds = len(sparse["values"])
            text = f"{task}: at least 100x fewer bytes, mean of {num_seeds} seeds within the control's spread"
            shown[text] = sparse["within_spread"] and sparse["compression"] >= 100
    return shown


def render(report: dict[str, Any]) -> str:
    """The Markdown report."""
    lines = [
        "# Accuracy with compressed gradients: codec x task",
        "",
        f"`{report['command']}`, commit {report['commit']}, {report['date']}",
        "",
        "Two ranks over gloo on the CPU, one thread each. A row has the weights, batches, steps, optimizer and "
        "schedule of the control of the same seed, but for what its second column says; seeds count from 0. Bytes are "
        "those that a rank sends in the whole run, headers included, against the fp32 all-reduce of the same "
        "gradients. Difference: mean over the seeds that the row shares with the control, positive where the row is "
        "better, and the standard deviation of the pairs. A row is within the spread if that mean is not below minus "
        "(largest - smallest of the control). Rows of fewer seeds say less.",
        "",
    ]
    for task, modes in report["cells"].items():
        settings = TASKS[task]
        by_loss = settings.judged_by == "loss"
        scale, digits = (1, 3) if by_loss else (100, 2)
        unit = "test loss in nats a character, lower is better" if by_loss else "test accuracy in %"
        control = modes[CONTROL]
        lines += [
            f"## {settings.model} on {settings.data}",
            "",
            f"{control['runs'][0]['num_steps']} steps of {settings.batch_size} samples; {unit}. "
            f"Spread of the control: {scale * control['control_spread']:.{digits}f}.",
            "",
            "| mode | codec | fewer bytes | mean | each seed | difference | verdict |",
            "|---|---|---|---|---|---|---|",
        ]
        for name, figures in modes.items():
            values = ", ".join(f"{scale * value:.{digits}f}" for value in figures["values"])
            deviation = figures["difference_std"]
            spread = "" if deviation is None else f" ± {scale * deviation:.{digits}f}"
            more = [_short(figures[kind]) for kind in ("plan", "changes") if figures[kind]]
            plan = "".join(f", {words}" for words in more)
            lines.append(
                f"| {name} | `{figures['codec']}`{plan} | {figures['compression']:.1f}x | "
                f"{scale * figures['mean']:.{digits}f} | {values} | "
                f"{scale * figures['difference']:+.{digits}f}{spread} | {verdict(name, figures)} |"
            )
        missing = [name for name in OTHER_MODES if name not in modes]
        lines += ["", f"Not run: {', '.join(missing)}.", ""] if missing else [""]
    lines += ["## Claims", ""]
    lines += [f"- {'holds' if holds else 'DOES NOT HOLD'}: {text}" for text, holds in report["claims"].items()]
    lines += [
        "",
        "## Settings tried",
        "",
        f"Seeds from {FIRST_TRIAL_SEED} on, judged on data that neither trains nor tests; the settings above were "
        "chosen from these. Rows of char that say nothing else have lr 0.2 and clip_norm 1, the control's before it "
        "was tuned here. *: counted by the exchange before, which sent a header for each parameter.",
        "",
        "| task | codec | plan | changes to the task | seed | steps | fewer bytes | accuracy, % | loss |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for trial in report["tried"]:
        what = [trial["task"], f"`{trial.get('codec', 'Identity()')}`"]
        what += [_short(trial.get("plan", {})), _short(trial.get("changes", {})), str(trial["seed"])]
        if "failed" in trial:
            what += ["", "", "", "diverged"]
        else:
            what += [str(trial["num_steps"]), f"{trial['compression']:.1f}x" + "*" * trial.get("old_exchange", 0)]
            what += [f"{100 * trial['accuracy']:.2f}", f"{trial['loss']:.4f}"]
        lines.append(f"| {' | '.join(what)} |")
    lines += [
        "",
        f"Configuration of the tasks: `{json.dumps(report['tasks'])}`",
        "",
        f"Environment: `{json.dumps(report['environment']['versions'])}`, {report['environment']['cpu']}, "
        f"{report['environment']['num_cpus']} CPUs.",
    ]
    return "\n".join(lines) + "\n"


def _short(changes: dict[str, Any]) -> str:
    """Settings in words: ``momentum_correction, sync masking``."""
    words = []
    for name, value in changes.items():
        inside = f" {_short(value)}" if isinstance(value, dict) else f" {value}"
        words.append(name + ("" if value is True else inside))
    return ", ".join(words)


def write(runs: dict[str, dict[str, list[dict[str, Any]]]], path: Path, command: str) -> bool:
    """Write the report of the runs so far; whether all claims hold."""
    cells = {task: {mode: cell(task, mode, modes) for mode in modes} for task, modes in runs.items()}
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True, check=True
    )
    report: dict[str, Any] = {
        "command": command,
        "commit": commit.stdout.strip(),
        "date": datetime.date.today().isoformat(),
        "tasks": {task: asdict(TASKS[task]) for task in runs},
        "cells": cells,
        "claims": claims(cells),
        "tried": [json.loads(line) for line in TRIED.read_text(encoding="utf-8").splitlines()]
        if TRIED.exists()
        else [],
        "environment": environment(),
    }
    write_atomic(path.with_suffix(".json"), json.dumps(report, indent=2) + "\n")
    write_atomic(path.with_suffix(".md"), render(report))
    return all(report["claims"].values())


def main() -> int:
    """Run what was asked for; rank 0 writes the report after every run. 1 if a claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=5, help="of the control and of the 100x cell")
    parser.add_argument("--other-seeds", type=int, default=5, help="of the other codecs")
    parser.add_argument("--try", dest="trials", type=Path, help="settings to try in place of the table, one a line")
    parser.add_argument("--hardware", default=f"{os.cpu_count()}core_{platform.machine().replace('x86_64', 'x86')}")
    parser.add_argument("--date", default=datetime.date.today().isoformat())
    parser.add_argument("--out", type=Path, default=HERE / "reports")
    args = parser.parse_args()
    torch.set_num_threads(1)
    path = args.out / f"codec_accuracy_{args.hardware}_{args.date}"
    command = " ".join([COMMAND, *sys.argv[1:]])
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {}
    all_hold = True
    with mesh.process_group(timeout_s=120):
        first = mesh.rank() == 0
        if args.trials:
            trials(args.trials, first=first)
            return 0
        for task, mode, seed in table(args.tasks, args.seeds, args.other_seeds):
            figures = run(TASKS[task], mode_of(task, mode), seed, "test")
            runs.setdefault(task, {}).setdefault(mode, []).append(figures)
            if first:
                print(task, mode, seed, figures, file=sys.stderr, flush=True)
                all_hold = write(runs, path, command)
    return 0 if all_hold else 1


if __name__ == "__main__":
    sys.exit(main())

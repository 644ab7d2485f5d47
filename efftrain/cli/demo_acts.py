"""The three acts of the demo. Each returns its figures, its claims and what the report draws."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from efftrain.cli.console import progress, say
from efftrain.compression import Int8, TopK, format_codec
from efftrain.config import dump_toml
from efftrain.data import ArrayDataset, load_watch, standardize
from efftrain.errors import EfftrainError
from efftrain.federated.recipe import DataConfig as FederatedData
from efftrain.federated.recipe import FederatedRecipe, UplinkConfig
from efftrain.federated.rounds import FederatedResult, run_federated
from efftrain.models.watch_cnn import WatchCNN
from efftrain.ondevice import Program, compile
from efftrain.parallel.recipe import ClusterRecipe, DataConfig, ModelConfig, ParallelConfig
from efftrain.report.compare import Run, read_run
from efftrain.report.run import read_metrics
from efftrain.training import LoopConfig, OptimizerConfig
from efftrain.units import KIB, format_bytes

PEOPLE = tuple(range(1, 9))
"""Whose watches take part in acts 1 and 2."""
NEWCOMER = 9
"""Whose watch the model has never seen before act 3."""

GRADIENT_CODEC = TopK(0.05, dense_below=256) >> Int8(block=64)
CLUSTER_EPOCHS = 40
CLUSTER_TIMEOUT_S = 300
CLUSTER_SPREAD = 0.015
"""Largest difference between five seeds of the uncompressed control (``benchmarks/reports/cluster_watch_*``)."""

FEDERATED_SPREAD = 0.011
"""Two standard deviations of compressed minus control over five seeds (``benchmarks/reports/federated_watch_*``)."""

DEVICE_EPOCHS = 15
DEVICE_LR = 0.04
DEVICE_RAM_GOAL = 64 * KIB
EQUALITY_STEPS = 100


@dataclass(frozen=True)
class Claim:
    """A promise, with the figures that keep or break it."""

    text: str
    holds: bool


@dataclass(frozen=True)
class Act:
    """What an act found out.

    Attributes:
        name: Key in ``result.json``.
        title: Heading in the report.
        story: What happened, in a few sentences.
        figures: For ``result.json``.
        claims: Checked promises.
        model_folder: The model that the next act starts from.
        drawn: What the report draws: runs, results, plans.
    """

    name: str
    title: str
    story: str
    figures: Mapping[str, Any]
    claims: tuple[Claim, ...]
    model_folder: Path
    drawn: Mapping[str, Any] = field(default_factory=dict)


def cluster_act(out: Path, seed: int) -> Act:
    """Act 1: two workers under torchrun, compressed gradients against the uncompressed control."""
    say(f"\n1  cluster: two workers pretrain on {len(PEOPLE)} people, gradients compressed")
    runs = {}
    for label, parallel in (
        ("uncompressed", ParallelConfig()),
        ("compressed", ParallelConfig(codec=format_codec(GRADIENT_CODEC))),
    ):
        recipe = ClusterRecipe(
            name=label,
            seed=seed,
            model=ModelConfig(name="watch-cnn"),
            data=DataConfig(name="watch", options={"people": len(PEOPLE), "train_share": 0.2}),
            optimizer=OptimizerConfig(lr=0.04, momentum=0.9),
            loop=LoopConfig(epochs=CLUSTER_EPOCHS, batch_size=32),
            parallel=parallel,
        )
        runs[label] = _torchrun(recipe, out / "cluster")
    control, compressed = runs["uncompressed"].result, runs["compressed"].result
    ratio = control["wire_bytes"] / compressed["wire_bytes"]
    gap = control["accuracy"] - compressed["accuracy"]
    say(
        f"   accuracy {_percent(compressed['accuracy'])}, control {_percent(control['accuracy'])}; "
        f"{ratio:.0f}x fewer bytes"
    )
    return Act(
        name="cluster",
        title="1. Cluster",
        story=(
            f"Two workers under torchrun train watch-cnn ({compressed['num_parameters']:,} parameters) on the first "
            f"20 % of every recording of {len(PEOPLE)} people, for {CLUSTER_EPOCHS} epochs. Gradients go through "
            f"{format_codec(GRADIENT_CODEC)} with error feedback; the control sends them as they are. "
            "Accuracy is on the last 30 % of the same recordings."
        ),
        figures={"compressed": dict(compressed), "uncompressed": dict(control), "wire_ratio": ratio},
        claims=(
            Claim(
                f"compressed training is as accurate as the control within the spread of its seeds: "
                f"{_percent(compressed['accuracy'])} against {_percent(control['accuracy'])}",
                gap <= CLUSTER_SPREAD,
            ),
            Claim(f"at least 20x fewer bytes on the wire: {ratio:.1f}x", ratio >= 20),
        ),
        model_folder=runs["compressed"].path / "model",
        drawn={"runs": list(runs.values())},
    )


def federated_act(out: Path, seed: int, start: Path) -> Act:
    """Act 2: the watches improve the model in rounds; their data stays where it is."""
    say(f"\n2  federated: {len(PEOPLE)} watches improve it in rounds, their data stays with them")
    initial = WatchCNN.from_pretrained(start).state_dict()
    recipe = FederatedRecipe(name="demo", seed=seed, data=FederatedData(people=PEOPLE))
    results = {}
    for label, uplink in (("fp32 FedAvg", UplinkConfig(codec="Identity()")), ("compressed", recipe.uplink)):
        results[label] = _rounds(label, replace(recipe, uplink=uplink), initial)
    control, compressed = results["fp32 FedAvg"], results["compressed"]
    model = WatchCNN()
    model.load_state_dict(compressed.state)
    folder = out / "federated"
    model.save_pretrained(folder / "model")
    ratio = control.total("uplink_bytes") / compressed.total("uplink_bytes")
    num_rounds = len(compressed.rounds)
    say(
        f"   accuracy {_percent(compressed.accuracy_before)} -> {_percent(compressed.accuracy)}, "
        f"control {_percent(control.accuracy)}; {ratio:.0f}x fewer uplink bytes"
    )
    return Act(
        name="federated",
        title="2. Federated",
        story=(
            f"Each of the {len(PEOPLE)} people's watches trains on the middle half of its own recordings and sends its "
            f"update through {compressed.to_dict()['codec']} with error feedback, for {num_rounds} rounds of FedAvg "
            "over Flower's Message API. The control sends its updates in fp32. Accuracy is on each person's last "
            "30 %, mean over people."
        ),
        figures={"compressed": compressed.to_dict(), "control": control.to_dict(), "uplink_ratio": ratio},
        claims=(
            Claim(
                f"the rounds improve the model: {_percent(compressed.accuracy_before)} before, "
                f"{_percent(compressed.accuracy)} after {num_rounds} rounds",
                compressed.accuracy > compressed.accuracy_before,
            ),
            Claim(
                f"as accurate as fp32 FedAvg within two deviations of their difference ({_percent(FEDERATED_SPREAD)}): "
                f"{_percent(compressed.accuracy)} against {_percent(control.accuracy)}",
                compressed.accuracy >= control.accuracy - FEDERATED_SPREAD,
            ),
            Claim(f"at least 10x fewer uplink bytes than fp32 FedAvg: {ratio:.1f}x", ratio >= 10),
        ),
        model_folder=folder / "model",
        drawn={"results": results},
    )


def device_act(out: Path, seed: int, start: Path) -> Act:
    """Act 3: generated C fine-tunes the model on the emulated watch of a person it has never seen."""
    say("\n3  device: the watch of a ninth person fine-tunes it in integers, on an emulated Cortex-M7")
    started = time.perf_counter()
    model = WatchCNN.from_pretrained(start)
    source, tune, test = _newcomer_data()
    program = compile(
        model,
        torch.zeros(1, *source.input_shape),
        scheme="sparse",
        board="stm32f746",
        calibration=source.inputs,
        learning_rate=DEVICE_LR,
        seed=seed,
        name="watch",
    )
    program.write(out / "device")
    plan = program.plan
    tune_x, test_x = program.quantize_input(tune.inputs), program.quantize_input(test.inputs)
    equal = _same_bits(program, tune_x, tune.targets)
    board, host = program.board(), program.host()
    before = board.evaluate(test_x, test.targets)
    rng = np.random.default_rng(seed)
    curve = [before]
    with progress("   fine-tuning on the board") as advance:
        for epoch in range(DEVICE_EPOCHS):
            order = rng.permutation(len(tune_x))
            for engine in (board, host):
                engine.set_lr_shift(3 * epoch // DEVICE_EPOCHS)  # lr, lr / 2, lr / 4
                engine.train(tune_x, tune.targets, order)
            curve.append(host.evaluate(test_x, test.targets))
            advance(epoch + 1, DEVICE_EPOCHS, f"accuracy {_percent(curve[-1])}")
    after = board.evaluate(test_x, test.targets)
    equal &= board.state_sha256() == host.state_sha256() and after == curve[-1]
    used = board.measured_ram_bytes
    say(
        f"   accuracy {_percent(before)} -> {_percent(after)}; "
        f"RAM planned {format_bytes(plan.total_ram_bytes)}, touched {format_bytes(used)} (some stack is reserve)"
    )
    return Act(
        name="device",
        title="3. Device",
        story=(
            f"The model moves to the watch of person {NEWCOMER}, whom it has never seen: an emulated STM32F746 with "
            f"{format_bytes(plan.board_ram_bytes)} of RAM mapped and nothing else. Generated C fine-tunes it there on "
            f"the first 30 % of every recording ({len(tune_x)} windows, {DEVICE_EPOCHS} epochs, batch 1, integers "
            "only), training the head, two biases and half of the last convolution. Accuracy is on the rest of the "
            "recordings."
        ),
        figures={
            "accuracy_before": before,
            "accuracy": after,
            "accuracy_per_epoch": curve,
            "num_steps": DEVICE_EPOCHS * len(tune_x),
            "measured_ram_bytes": used,
            "measured_stack_bytes": board.measured_stack_bytes,
            "state_sha256": board.state_sha256(),
            "host_state_sha256": host.state_sha256(),
            "bit_equal": equal,
            "plan": plan.to_dict(),
            "wall_s": time.perf_counter() - started,
        },
        claims=(
            Claim(
                f"fine-tuning helps a new person: {_percent(before)} before, {_percent(after)} after", after > before
            ),
            Claim(
                f"whole RAM with stack at most {format_bytes(DEVICE_RAM_GOAL)}: planned "
                f"{format_bytes(plan.total_ram_bytes)}, touched {format_bytes(used)}",
                used <= plan.total_ram_bytes <= DEVICE_RAM_GOAL,
            ),
            Claim(
                f"simulator, host C and board agree in every bit of the trained state after {EQUALITY_STEPS} steps, "
                f"host and board after all {DEVICE_EPOCHS * len(tune_x)}",
                equal,
            ),
        ),
        model_folder=out / "device",
        drawn={"curve": curve, "plan": plan.to_dict()},
    )


def _torchrun(recipe: ClusterRecipe, folder: Path) -> Run:
    """Run a recipe on two workers and wait for it, with a progress bar fed from its metrics."""
    folder.mkdir(parents=True, exist_ok=True)
    (path := folder / f"{recipe.name}.toml").write_text(dump_toml(recipe), encoding="utf-8")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, "-m", "efftrain", "train", str(path), "--out", str(folder), "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    deadline = time.monotonic() + CLUSTER_TIMEOUT_S
    log_path = folder / f"{recipe.name}.log"
    with log_path.open("w", encoding="utf-8") as log, progress(f"   {recipe.name}") as advance:
        # A session of its own, so that an interrupt or a time-out ends the launcher and its workers together.
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, env=environment, text=True, start_new_session=True
        )
        try:
            while process.poll() is None:
                if time.monotonic() > deadline:
                    raise EfftrainError(f"the cluster run took more than {CLUSTER_TIMEOUT_S} s; its log is {log_path}")
                _show_progress(folder / recipe.name / "metrics.jsonl", recipe.loop.epochs, advance)
                time.sleep(0.1)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            output = process.communicate()[0]
    if process.returncode:
        lines = [line for line in log_path.read_text(encoding="utf-8").splitlines() if line.startswith("efftrain:")]
        raise EfftrainError(f"the cluster run failed: {' '.join(lines) or 'see its log'} ({log_path})")
    return read_run(Path(json.loads(output)["path"]))


def _show_progress(metrics: Path, epochs: int, advance: Callable[..., None]) -> None:
    evaluated = [row for row in read_metrics(metrics, partial=True) if row["kind"] == "eval"]
    if evaluated:
        advance(evaluated[-1]["epoch"], epochs, f"accuracy {_percent(evaluated[-1]['accuracy'])}")


def _rounds(label: str, recipe: FederatedRecipe, initial: Mapping[str, torch.Tensor]) -> FederatedResult:
    with progress(f"   {label}") as advance:
        return run_federated(
            recipe,
            initial=initial,
            on_round=lambda one: advance(one.round, recipe.server.rounds, f"accuracy {_percent(one.accuracy)}"),
        )


def _newcomer_data() -> tuple[ArrayDataset, ArrayDataset, ArrayDataset]:
    """What the server has seen, the newcomer's windows to learn from, and those to test on; all on one scale."""
    data = load_watch()
    source, scale = standardize(data.select(PEOPLE, "early"))
    tune, test = (standardize(data.select(NEWCOMER, part), scale)[0] for part in ("first30", "rest70"))
    return source, tune, test


def _same_bits(program: Program, xs: Any, labels: Any) -> bool:
    """Whether all three back ends hold the same trained state after a few steps."""
    order = np.arange(EQUALITY_STEPS) % len(xs)
    hashes = set()
    for engine in (program.simulator(), program.host(), program.board()):
        engine.train(xs, labels, order)
        hashes.add(engine.state_sha256())
    return len(hashes) == 1


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"

"""Claims: what our federated round costs beside the training in it, and that 10,000 clients fit on a laptop.

``python benchmarks/federated_speed.py`` runs the workload of the federated comparison (54,314-parameter network on
Fashion-MNIST, 50 samples a client, batches of 10, one epoch, learning rate 0.1; 100 of 1,000 clients a round, fp32
uplink, so that nothing but the round itself is added) in these ways, interleaved in one process:

- a plain PyTorch loop in one thread: load the model, train it on each client's samples, average;
- our round with the ``torch`` engine, and with the ``device`` engine, with one and with two workers;
- the ``torch`` round with a population of 100,000 instead of 1,000.

Ratios are of CPU seconds, which a busy machine disturbs less than the clock; two workers are compared by the clock.
Then, in processes of their own: from the start to the end of round 1 with 1,000 clients, and 10,000 clients in one
round with wall time and peak memory. It writes a report, and exits with 1 if a claim does not hold.
"""

import argparse
import datetime
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn

from efftrain.config import to_dict
from efftrain.federated import FederatedRecipe, RoundResult, drive_rounds
from efftrain.federated.client_app import app
from efftrain.federated.data import client_train
from efftrain.federated.flower import VERSION, quiet
from efftrain.federated.grid import InProcessGrid
from efftrain.federated.recipe import ClientConfig, DataConfig, ModelConfig, RoundsConfig, UplinkConfig
from efftrain.models import build_model

ROOT = Path(__file__).parent.parent
RECIPE = FederatedRecipe(
    name="speed",
    model=ModelConfig(name="fashion-cnn"),
    data=DataConfig(name="fashion-mnist", partition="iid", clients=1000, samples_per_client=50),
    client=ClientConfig(epochs=1, batch_size=10, lr=0.1),
    server=RoundsConfig(cohort=100, evaluate="server", evaluate_every=10**6),
    uplink=UplinkConfig(codec="Identity()", feedback=False),
)


def plain_round(model: nn.Module, number: int) -> None:
    """What anybody would write down for one round."""
    world = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    total = {name: torch.zeros_like(tensor) for name, tensor in world.items()}
    clients = np.random.default_rng(number).permutation(1000)[:100]
    for client in clients.tolist():
        data = client_train(RECIPE.data, client, RECIPE.seed)
        model.load_state_dict(world)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        order = np.random.default_rng([number, client]).permutation(len(data))
        for start in range(0, len(data), 10):
            inputs, targets = data.batch(order[start : start + 10])
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(torch.from_numpy(inputs)), torch.from_numpy(targets))
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            loss.item()
        for name, tensor in model.state_dict().items():
            total[name] += tensor / len(clients)
    model.load_state_dict(total)


class Rounds:
    """One of our ways, a round at a time."""

    def __init__(self, recipe: FederatedRecipe, workers: int) -> None:
        self._recipe = replace(recipe, server=replace(recipe.server, rounds=10**6))
        self._grid = InProcessGrid(app, recipe.num_clients, workers=workers, timeout_s=600.0)

    def run(self, rounds: int) -> tuple[list[float], list[float]]:
        """CPU and wall seconds of each round but the first, which starts, and the last, which measures the model."""
        cpu, wall = [time.process_time()], [time.perf_counter()]

        def on_round(_: RoundResult) -> None:
            cpu.append(time.process_time())
            wall.append(time.perf_counter())

        recipe = replace(self._recipe, server=replace(self._recipe.server, rounds=rounds + 2))
        with quiet():
            drive_rounds(self._grid, recipe, on_round=on_round)
        return np.diff(cpu)[1:-1].tolist(), np.diff(wall)[1:-1].tolist()


def plain(rounds: int) -> tuple[list[float], list[float]]:
    torch.manual_seed(0)
    model = build_model("fashion-cnn")
    plain_round(model, 0)
    cpu, wall = [], []
    for number in range(1, rounds + 1):
        start_cpu, start = time.process_time(), time.perf_counter()
        plain_round(model, number)
        cpu.append(time.process_time() - start_cpu)
        wall.append(time.perf_counter() - start)
    return cpu, wall


def command_line(*arguments: str) -> dict[str, Any]:
    """A run in a process of its own."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-m", "efftrain", "federate", *arguments, "--out", folder, "--json"],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        result: dict[str, Any] = json.loads(done.stdout)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    result["process_s"] = time.perf_counter() - started
    result["process_cpu_s"] = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--report", type=Path, help="write PATH.md and PATH.json instead of the default")
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = replace(RECIPE, client=replace(RECIPE.client, engine="device"))
    crowd = replace(RECIPE, data=replace(RECIPE.data, clients=100_000))
    ways: dict[str, Callable[[int], tuple[list[float], list[float]]]] = {
        "plain loop": plain,
        "torch, 1 worker": Rounds(RECIPE, 1).run,
        "torch, 100,000 clients": Rounds(crowd, 1).run,
        "device, 1 worker": Rounds(device, 1).run,
        "device, 2 workers": Rounds(device, 2).run,
        "torch, 2 workers": Rounds(RECIPE, 2).run,
    }
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    wall: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(args.repeats):
        for name, run in ways.items():
            found_cpu, found_wall = run(args.rounds)
            cpu[name] += found_cpu
            wall[name] += found_wall
            print(f"{repeat}: {name}: CPU {median(found_cpu):.3f} s, wall {median(found_wall):.3f} s", file=sys.stderr)
    figures: dict[str, Any] = {
        name: {
            "cpu_s": median(cpu[name]),
            "wall_s": median(wall[name]),
            "cpu_ratio": median(cpu[name]) / median(cpu["plain loop"]),
            "wall_ratio": median(wall[name]) / median(wall["plain loop"]),
            "cpu_spread": [min(cpu[name]), max(cpu[name])],
        }
        for name in ways
    }
    recipes = ROOT / "federated" / "recipes"
    first = command_line(str(recipes / "fashion_1000.toml"), "--set", "server.rounds=1")
    many = command_line(str(recipes / "fashion_10000.toml"), "--set", "server.rounds=1")
    kept = ("first_round_s", "train_s", "process_s", "process_cpu_s", "peak_rss_bytes", "clients_trained", "engine")
    report = {
        "date": str(datetime.date.today()),
        "command": "python benchmarks/federated_speed.py",
        "recipe": to_dict(RECIPE),
        "repeats": args.repeats,
        "rounds": args.rounds,
        "ways": figures,
        "first_round_1000_clients": {name: first[name] for name in kept},
        "round_of_10000_clients": {name: many[name] for name in kept},
        "load_average": list(os.getloadavg()),
        "claims": claims(figures, first, many),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "flwr": VERSION,
        },
    }
    path = args.report or ROOT / "benchmarks" / "reports" / f"federated_speed_{_hardware()}_{datetime.date.today()}"
    path.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown(report), encoding="utf-8")
    print(json.dumps(report["claims"]))
    return 0 if all(claim["holds"] for claim in report["claims"]) else 1


def claims(figures: dict[str, Any], first: dict[str, Any], many: dict[str, Any]) -> list[dict[str, Any]]:
    crowd = figures["torch, 100,000 clients"]["cpu_s"] / figures["torch, 1 worker"]["cpu_s"]
    loop = "against the plain loop"
    rows = [
        (f"torch engine, CPU seconds {loop}", figures["torch, 1 worker"]["cpu_ratio"], 1.15),
        (
            f"device engine, one worker, CPU seconds {loop}",
            figures["device, 1 worker"]["cpu_ratio"],
            0.4,
        ),
        (
            f"device engine, two workers, wall time {loop}",
            figures["device, 2 workers"]["wall_ratio"],
            0.22,
        ),
        ("100,000 clients against 1,000, 100 a round, CPU seconds", crowd, 1.10),
        ("start of the run to the end of round 1, 1,000 clients, seconds", first["first_round_s"], 5.0),
        ("10,000 clients in one round, seconds of the round", many["train_s"], 20.0),
        ("10,000 clients in one round, peak memory in GB", many["peak_rss_bytes"] / 1e9, 2.0),
    ]
    return [
        {"claim": name, "measured": float(value), "at_most": limit, "holds": bool(value <= limit)}
        for name, value, limit in rows
    ]


def markdown(report: dict[str, Any]) -> str:
    lines = [
        "# What a federated round costs",
        "",
        f"`{report['command']}`, {report['date']}; load average at the end "
        f"{', '.join(f'{one:.1f}' for one in report['load_average'])} (others used the machine meanwhile, where it is "
        "above 2).",
        "",
        f"Median of {report['repeats']} x {report['rounds']} rounds, interleaved in one process; 100 clients of 50 "
        "samples a round, fp32 uplink. CPU seconds are of all threads together.",
        "",
        "| way | CPU s | least, most | ratio to the plain loop | wall s | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for name, one in report["ways"].items():
        low, high = one["cpu_spread"]
        lines.append(
            f"| {name} | {one['cpu_s']:.3f} | {low:.3f}, {high:.3f} | {one['cpu_ratio']:.2f} | {one['wall_s']:.3f} | "
            f"{one['wall_ratio']:.2f} |"
        )
    lines += ["", "| claim | measured | at most | holds |", "|---|---|---|---|"]
    lines += [
        f"| {one['claim']} | {one['measured']:.2f} | {one['at_most']:g} | {'yes' if one['holds'] else '**no**'} |"
        for one in report["claims"]
    ]
    many = report["round_of_10000_clients"]
    loops = many["clients_trained"] / 100 * report["ways"]["plain loop"]["wall_s"] / 2
    lines += [
        "",
        "10,000 clients: `efftrain federate federated/recipes/fashion_10000.toml --set server.rounds=1`, "
        f"{many['process_s']:.1f} s and {many['process_cpu_s']:.1f} CPU s for the whole process, imports, evaluations "
        "and report included; half of the CPU seconds is what two idle cores would take at least. Two plain loops "
        f"side by side would take {loops:.1f} s for as many clients, {loops / many['train_s']:.1f} times as long. "
        f"1,000 clients: {report['first_round_1000_clients']['process_cpu_s']:.1f} CPU s for the whole process.",
        "",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in report["versions"].items()) + ".",
    ]
    return "\n".join(lines) + "\n"


def _hardware() -> str:
    return f"{os.cpu_count()}core_{'x86' if platform.machine() == 'x86_64' else platform.machine()}"


if __name__ == "__main__":
    sys.exit(main())

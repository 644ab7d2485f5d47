"""What a simulated client costs: the client engines against a plain PyTorch loop, in one run, taking turns.

The loop is what anybody would write: one module, loaded with the round's weights for every client, eager SGD on one
thread; no grid, no messages. Every engine does the same clients with the same shuffles on the same data. Seconds are
CPU seconds of the process for one thread, and of the clock for two threads; what counts is their ratio to the loop's.

    OMP_NUM_THREADS=1 python benchmarks/federated_engine.py --repeats 7
"""

import argparse
import datetime
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from efftrain.data import ArrayDataset
from efftrain.federated.data import client_train
from efftrain.federated.engines import Engine, State, get_engine
from efftrain.federated.recipe import ClientConfig, DataConfig, ModelConfig
from efftrain.models import build_model

GOALS = {"device, one thread": 0.40, "device, two threads": 0.22}
JOBS: dict[str, tuple[ModelConfig, DataConfig, ClientConfig]] = {
    "fashion-cnn": (
        ModelConfig(name="fashion-cnn"),
        DataConfig(name="fashion-mnist", partition="iid", clients=1000, samples_per_client=50),
        ClientConfig(engine="device", epochs=1, batch_size=10, lr=0.1),
    ),
    "watch-cnn": (
        ModelConfig(name="watch-cnn"),
        DataConfig(name="watch", partition="iid", clients=30, samples_per_client=50),
        ClientConfig(engine="device", epochs=1, batch_size=10, lr=0.05),
    ),
}
MANY = 10_000
STACK = 16
"""Clients that the ``vmap`` engine trains at a time, each in a thread that mostly waits."""


class Job:
    """One model, its clients' data, and every way to train them."""

    def __init__(self, name: str, num_clients: int) -> None:
        self.model, data, self.config = JOBS[name]
        self.clients = [client_train(data, i % data.clients) for i in range(num_clients)]
        self.state = get_engine("device").initial_state(self.model, 0)
        self.module = build_model(self.model.name)

    def plain(self) -> list[State]:
        """The loop."""
        start = {name: torch.from_numpy(np.asarray(tensor)) for name, tensor in self.state.items()}
        return [self._plain(start, data, seed) for seed, data in enumerate(self.clients)]

    def _plain(self, start: dict[str, torch.Tensor], data: ArrayDataset, seed: int) -> State:
        self.module.load_state_dict(start)
        optimizer = torch.optim.SGD(self.module.parameters(), lr=self.config.lr)
        inputs, targets = torch.from_numpy(data.inputs), torch.from_numpy(data.targets)
        order = torch.from_numpy(np.random.default_rng(seed).permutation(len(data)))
        for batch in torch.split(order, self.config.batch_size):
            optimizer.zero_grad()
            nn.functional.cross_entropy(self.module(inputs[batch]), targets[batch]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return {name: tensor.numpy().copy() for name, tensor in self.module.state_dict().items()}

    def engine(self, name: str, config: ClientConfig, num_threads: int = 1) -> list[State]:
        """All clients through an engine."""
        engine = get_engine(name)
        if num_threads == 1:
            return [self._one(engine, config, seed) for seed in range(len(self.clients))]
        with ThreadPoolExecutor(num_threads) as pool:
            return list(pool.map(lambda seed: self._one(engine, config, seed), range(len(self.clients)), chunksize=8))

    def _one(self, engine: Engine, config: ClientConfig, seed: int) -> State:
        return engine.train(self.model, self.state, self.clients[seed], config, seed).state


def measure(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, list[float]]]:
    """CPU and wall seconds of each, taking turns after one turn to warm up."""
    times: dict[str, dict[str, list[float]]] = {name: {"cpu_s": [], "wall_s": []} for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            if turn:
                times[name]["wall_s"].append(time.perf_counter() - wall)
                times[name]["cpu_s"].append(time.process_time() - cpu)
    return times


def compare(name: str, num_clients: int, repeats: int) -> dict[str, Any]:
    job = Job(name, num_clients)
    runs: dict[str, Callable[[], object]] = {
        "plain loop": job.plain,
        "torch": lambda: job.engine("torch", job.config),
        "device, one thread": lambda: job.engine("device", job.config),
        "device, two threads": lambda: job.engine("device", job.config, 2),
        f"vmap, stacks of {STACK}": lambda: job.engine("vmap", replace(job.config, engine="vmap", stack=STACK), STACK),
    }
    sparse = ClientConfig(engine="device", scheme="sparse", lr=0.02, epochs=1)
    runs["device, sparse int8, one thread"] = lambda: job.engine("device", sparse)
    times = measure(runs, repeats)
    rows = {}
    for label, taken in times.items():
        clock = "wall_s" if "two threads" in label else "cpu_s"
        ratios = np.array(taken[clock]) / np.array(times["plain loop"][clock])
        rows[label] = {
            "clock": clock,
            "ms_a_client": 1000 * float(np.median(taken[clock])) / num_clients,
            "ratio": float(np.median(ratios)),
            "least": float(ratios.min()),
            "most": float(ratios.max()),
        }
    plain, device, threads = job.plain(), job.engine("device", job.config), job.engine("device", job.config, 2)
    differences = [float(np.abs(a[key] - b[key]).max()) for a, b in zip(plain, device, strict=True) for key in a]  # type: ignore[operator]
    equal = all(np.array_equal(a[key], b[key]) for a, b in zip(device, threads, strict=True) for key in a)
    return {
        "clients": num_clients,
        "rows": rows,
        "largest_difference": max(differences),
        "median_difference": float(np.median(differences)),
        "equal_for_two_threads": equal,
    }


def many() -> dict[str, float]:
    """So many clients in one go, the engine alone: data made, trained and thrown away on two threads."""
    model, data, config = JOBS["fashion-cnn"]
    engine = get_engine("device")
    state = engine.initial_state(model, 0)

    def one(seed: int) -> int:
        return engine.train(model, state, client_train(data, seed % data.clients), config, seed).num_samples

    wall, cpu = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(2) as pool:
        samples = sum(pool.map(one, range(MANY), chunksize=32))
    return {"samples": samples, "wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}


def render(report: dict[str, Any]) -> str:
    lines = [
        "# Client engines against a plain PyTorch loop",
        "",
        f"`{report['command']}`, {report['hardware']}. "
        + ", ".join(f"{name} {number}" for name, number in report["versions"].items())
        + ".",
        "",
        "Every client: 50 samples, batches of 10, 1 epoch, plain SGD; all start from the same weights. Median of "
        f"{report['repeats']} turns after one to warm up; the ratio is taken turn by turn, its range is in brackets. "
        "One thread in CPU seconds, two threads in seconds of the clock. "
        f"Load average over the last 5 minutes: {report['load_average']}, so other work shared the cores if that is "
        "above 2.",
    ]
    for name, job in report["jobs"].items():
        lines += [
            "",
            f"## {name}, {job['clients']} clients a turn",
            "",
            "| | ms a client | of the plain loop | goal |",
            "|---|---|---|---|",
        ]
        for label, row in job["rows"].items():
            goal = GOALS.get(label) if name == "fashion-cnn" else None
            text = "" if goal is None else f"<= {goal} {'reached' if row['ratio'] <= goal else '**missed**'}"
            ratio = f"{row['ratio']:.3f} ({row['least']:.3f} to {row['most']:.3f})"
            lines.append(f"| {label} | {row['ms_a_client']:.2f} | {ratio} | {text} |")
        lines += [
            "",
            f"Weights of `device` and of the loop after training differ by {job['largest_difference']:.1e} at most, "
            f"by {job['median_difference']:.1e} in the median tensor (a rounding that moves a ReLU or a pool past its "
            f"kink shows). One and two threads give equal bits: {'yes' if job['equal_for_two_threads'] else '**no**'}.",
        ]
    done = report["many"]
    lines += [
        "",
        f"{MANY:,} clients of fashion-cnn through the `device` engine on two threads, their data made on the way: "
        f"{done['wall_s']:.1f} s, {done['cpu_s']:.1f} CPU seconds. The engine alone: no grid, no codec, no sum.",
        "",
        f"`vmap` is for GPUs, and computed on this processor here: {STACK} threads fill a stack, one of them computes.",
        "",
        "The int8 row trains what the scheme `sparse` names, one sample at a time, as the microcontroller does, and "
        "measures its loss in fp32 afterwards; the loop beside it trains every layer in batches.",
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=6 * STACK)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--report", type=Path, help="write PATH.md and PATH.json instead of the default")
    options = parser.parse_args()
    torch.set_num_threads(1)
    machine = {"x86_64": "x86", "AMD64": "x86"}.get(platform.machine(), platform.machine())
    hardware = f"{os.cpu_count()}core_{machine}"
    report: dict[str, Any] = {
        "command": f"OMP_NUM_THREADS=1 python benchmarks/federated_engine.py --clients {options.clients} "
        f"--repeats {options.repeats}",
        "hardware": hardware,
        "repeats": options.repeats,
        "jobs": {name: compare(name, options.clients, options.repeats) for name in JOBS},
        "many": many(),
        "load_average": round(os.getloadavg()[1], 1),
        "versions": {"Python": platform.python_version(), **{name: version(name) for name in ("torch", "numpy")}},
    }
    place = Path(__file__).parent / "reports" / f"federated_engine_{hardware}_{datetime.date.today()}"
    path: Path = options.report or place
    path.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(render(report), encoding="utf-8")
    print(render(report))
    rows = report["jobs"]["fashion-cnn"]["rows"]
    return 0 if all(rows[label]["ratio"] <= goal for label, goal in GOALS.items()) else 1


if __name__ == "__main__":
    sys.exit(main())

"""The planner's predictions beside what is measured: step time and memory over plans, codecs, ranks and link rates.

Every rank is a network namespace behind a token bucket, as in ``limited_link.py``; all share the machine's cores. What
the planner knows is measured first: this machine and each model on one process (``efftrain plan --calibrate``), and
each network's link between all ranks. Plans, codecs and exchanges are held out. Needs root on Linux (iproute2).

    python -m benchmarks.planner --ranks 2 4 --rates 100mbit 1gbit
"""

import argparse
import ctypes
import datetime
import gc
import itertools
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.limited_link import SUBNET, network
from efftrain.compression import parse_codec
from efftrain.config.load import from_dict
from efftrain.models import build_model
from efftrain.parallel import Plan, mesh
from efftrain.parallel.backends import Transport
from efftrain.parallel.pipeline import SCHEDULES, SPLIT_BACKWARD
from efftrain.parallel.planner import Hardware, Planner, Setting, describe, load_hardware
from efftrain.parallel.planner.calibrate import Calibration
from efftrain.parallel.replicas import sum_numbers
from efftrain.training import OptimizerConfig

HERE = Path(__file__).parent
WARM_UP = 3
BLOCK_S = 0.3
ROUNDS = 7
OPTIMIZER = OptimizerConfig(lr=0.01, momentum=0.9, schedule="constant")
# Name -> family, options, samples of a batch. Steps of a few milliseconds find a quiet moment on a machine with other
# work, so the small models are judged by their time; memory of large ones is no matter of luck.
SMALL: dict[str, tuple[str, dict[str, Any], int]] = {
    "mlp-1m": ("mlp-10m", {"hidden": (768, 512)}, 32),
    "char-small": (
        "char-transformer",
        {"width": 64, "depth": 2, "heads": 4, "context": 32, "tied": False},
        32,
    ),
}
LARGE: dict[str, tuple[str, dict[str, Any], int]] = {
    "mlp-10m": ("mlp-10m", {}, 64),
    "char-large": (
        "char-transformer",
        {"width": 192, "depth": 4, "heads": 4, "context": 64, "tied": False},
        64,
    ),
}
MODELS = SMALL | LARGE
CODECS = ("Identity()", "Int8()", "TopK(0.01) >> Int8()")


def setting(name: str) -> Setting:
    family, options, batch_size = MODELS[name]
    torch.manual_seed(0)
    model = build_model(family, **options)
    shape: Any = model.input_shape
    sample = torch.randint(0, 256, (1, *shape)) if family == "char-transformer" else torch.randn(1, *shape)
    return Setting(model, sample, batch_size, OPTIMIZER)


def plans(name: str, ranks: int, rate: str) -> list[Plan]:
    """Of the data axis with every codec; where links are fast enough for them, of the other axes."""
    found = [Plan(codec=parse_codec(codec)) for codec in CODECS]
    if rate == "100mbit" and name in SMALL:
        return found
    found += [Plan(shard="full"), Plan(shard="grads")]
    if MODELS[name][0] == "char-transformer":
        data = ranks // 2
        found += [
            Plan(data=data, tensor=2),
            Plan(data=data, pipeline=2, schedule="1f1b"),
            Plan(data=data, pipeline=2, schedule="interleaved_zero_bubble"),
        ]
    if name == "char-large":  # memory alone, so more ways to spend it
        found += [Plan(checkpointing="selective"), Plan(checkpointing="full")]
        for schedule in SCHEDULES:
            found.append(Plan(data=1, pipeline=2, schedule=schedule, microbatches=8))
            if schedule not in SPLIT_BACKWARD:
                found.append(Plan(data=1, pipeline=2, schedule=schedule, microbatches=4, checkpointing="full"))
    return found


def worker(name: str, rate: str) -> None:
    """One rank: what the planner needs to know, and every plan, in turns; rank 0 prints."""
    torch.set_num_threads(1)
    with mesh.process_group(timeout_s=120) as device:
        if name in SMALL:
            times(name, rate, mesh.transport(device))
        else:
            memory(name, rate, mesh.transport(device))


def times(name: str, rate: str, transport: Transport) -> None:
    """Rounds of calibration and of some steps of every plan, so that noise hurts both alike."""
    jobs = [_Steps(name, plan) for plan in plans(name, mesh.world_size(), rate)]
    base = replace(load_hardware("laptop_2core"), cores=os.cpu_count() or 1, memory_gib=1e6)
    calibration = Calibration(base, setting(name), transport)
    for _ in range(ROUNDS):
        calibration.measure()
        for number, job in enumerate(jobs):
            step_s = job.step_s()
            if mesh.rank() == 0:
                print(json.dumps({"number": number, "step_s": step_s, "load": os.getloadavg()[0]}), flush=True)
    if mesh.rank() == 0:
        print(json.dumps({"hardware": asdict(calibration.hardware())}), flush=True)


class _Steps:
    """Steps of a plan, in blocks."""

    def __init__(self, name: str, plan: Plan) -> None:
        what = setting(name)
        shape = (what.batch_size, *what.sample.shape[1:])
        if what.sample.dtype == torch.int64:
            inputs, targets = torch.randint(256, shape), torch.randint(256, shape)
        else:
            inputs, targets = torch.randn(shape), torch.randint(10, shape[:1])
        self._job = plan.apply(what.model, inputs, optimizer=what.optimizer)
        del what
        self._batch = self._job.share(inputs, targets)
        self._take(WARM_UP)
        took = self._job.exchange.sum([median(self._take(3))])[0] / mesh.world_size()
        self._num = max(3, min(50, round(BLOCK_S / took)))  # equal on all ranks

    def step_s(self) -> float:
        """Seconds of the middle step of a block."""
        self._job.exchange.sum([0.0])
        return median(self._take(self._num))

    def _take(self, num: int) -> list[float]:
        times = [time.perf_counter()]
        for _ in range(num):
            self._job.step(*self._batch)
            times.append(time.perf_counter())
        return [after - before for before, after in itertools.pairwise(times)]


def memory(name: str, rate: str, transport: Transport) -> None:
    """The most memory that a rank takes for each plan beyond what it had before."""
    found = list(enumerate(plans(name, mesh.world_size(), rate)))
    for number, plan in found + found:  # the first of a kind loads code, too; the second counts
        before = memory_before()
        job = _Steps(name, plan)
        peak = status_bytes("VmHWM") - before
        del job
        peaks = sum_numbers(transport, [float(peak * (rank == mesh.rank())) for rank in range(mesh.world_size())])
        if mesh.rank() == 0:
            print(json.dumps({"number": number, "memory_bytes": max(peaks)}), flush=True)


def memory_before() -> int:
    """Give back what is free, forget the old peak, and say what is in use."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return status_bytes("VmRSS")


def status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def run_ranks(name: str, ranks: int, rate: str, timeout_s: float) -> list[dict[str, Any]]:
    """All plans of one model on one network; what rank 0 printed."""
    shared = {
        **os.environ,
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": f"{SUBNET}.1",
        "MASTER_PORT": "29561",
        "GLOO_SOCKET_IFNAME": "eth0",
        "OMP_NUM_THREADS": "1",
    }
    if name in LARGE:  # freed memory must not stay in the process and count as used by the next plan
        shared |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.planner", "--worker", name, "--rates", rate]
    workers = [
        subprocess.Popen(
            ["ip", "netns", "exec", f"eft{rank}", *command],
            env={**shared, "RANK": str(rank)},
            stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
            stderr=subprocess.DEVNULL if rank else None,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        output, _ = workers[0].communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        workers[0].kill()
        output, _ = workers[0].communicate()
    finally:
        for one in workers:
            one.kill()
            one.wait()
    return [json.loads(line) for line in (output or "").splitlines() if line.startswith("{")]


def shorten_bucket(ranks: int, rate: str) -> None:
    """Let a node send no more ahead of its rate than what fills 0.6 ms: a real link has no credit to save up."""
    megabits = int(rate.removesuffix("gbit")) * 1000 if rate.endswith("gbit") else int(rate.removesuffix("mbit"))
    burst = megabits * 75
    for rank in range(ranks):
        # What the kernel hands over at once must fit, or the bucket cuts it up at the processor's expense.
        for command in (
            f"ip -n eft{rank} link set dev eth0 gso_max_size {min(65536, burst - 500)}",
            f"tc -n eft{rank} qdisc change dev eth0 root tbf rate {rate} burst {burst} latency 200ms",
        ):
            subprocess.run(command.split(), check=True)


def judge(name: str, ranks: int, rate: str, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Measured beside predicted."""
    hardware = replace(load_hardware("laptop_2core"), memory_gib=1e6)
    for line in lines:
        if "hardware" in line:
            hardware = from_dict(Hardware, line["hardware"])
    planner = Planner(setting(name), hardware)
    rows = []
    for number, plan in enumerate(plans(name, ranks, rate)):
        some = [line for line in lines if line.get("number") == number]
        if not some:
            continue
        found = planner.predict(plan, ranks)
        axes = describe(found.plan)
        row: dict[str, Any] = {
            "model": name,
            "ranks": ranks,
            "rate": rate,
            "plan": " ".join(f"{key}={value}" for key, value in axes.items() if value != 1 or key == "data"),
            **{f"predicted_{key}": value for key, value in found.to_dict().items()},
        }
        if name in SMALL:
            steps = [line["step_s"] for line in some]
            row |= {"measured_s": median(steps), "rounds_s": steps, "load": max(line["load"] for line in some)}
            row["scatter"] = (max(steps) - min(steps)) / median(steps)
            row["time_error"] = row["predicted_step_s"] / row["measured_s"] - 1
            parts = {key: round(1000 * value, 1) for key, value in row["predicted_time"].items() if value}
            text = f"{1000 * row['measured_s']:.1f} ms, {1000 * row['predicted_step_s']:.1f} {parts}"
            text += f" {row['time_error']:+.0%}, scatter {row['scatter']:.0%}"
        else:
            row["measured_bytes"] = some[-1]["memory_bytes"]
            row["memory_error"] = row["predicted_memory_bytes"] / row["measured_bytes"] - 1
            text = f"{row['measured_bytes'] / 1e6:.1f} MB, {row['predicted_memory_bytes'] / 1e6:.1f}"
        rows.append(row)
        print(f"{name} {ranks} {rate} {row['plan']}: {text}", file=sys.stderr, flush=True)
    return rows


def first_choices(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each model, number of ranks and rate: how much slower the first choice is than the best measured."""
    found = []
    for key in dict.fromkeys((row["model"], row["ranks"], row["rate"]) for row in rows):
        group = [row for row in rows if (row["model"], row["ranks"], row["rate"]) == key]
        chosen = min(group, key=lambda row: row["predicted_step_s"])
        best = min(group, key=lambda row: row["measured_s"])
        loss = chosen["measured_s"] / best["measured_s"] - 1
        found.append(
            dict(zip(("model", "ranks", "rate"), key, strict=True))
            | {"chosen": chosen["plan"], "best": best["plan"], "loss": loss}
        )
    return found


def render(report: dict[str, Any]) -> str:
    """The Markdown report."""
    rows, choices = report["rows"], report["choices"]
    timed, large = ([row for row in rows if row["model"] in some] for some in (SMALL, LARGE))
    within = sum(abs(row["time_error"]) <= 0.2 for row in timed)
    memory = sum(abs(row["memory_error"]) <= 0.1 for row in large)
    good = sum(choice["loss"] <= 0.1 for choice in choices)
    lines = [
        "# The planner: predicted against measured",
        "",
        f"`{report['command']}`, {report['date']}",
        "",
        "| goal | reached |",
        "|---|---|",
        f"| step time within 20 % on at least 90 % of the cells | {within} of {len(timed)} |",
        f"| the first choice within 10 % of the best measured | {good} of {len(choices)} |",
        f"| peak memory of a rank within 10 % | {memory} of {len(large)} |",
        "",
        f"Measured: the middle step of {BLOCK_S:g} s, of that the median of {ROUNDS} rounds, in turns with what the "
        "planner is told; memory is the growth of the resident set at its peak, of the rank with the largest. Times "
        "are judged of the small models, memory of the large ones. "
        "The planner is told what `efftrain plan --calibrate` finds between the ranks of a network: this machine, its "
        "codecs on random gradients, the model on one process, the link, and steps of small probes under each axis. "
        "Plans, codecs and exchanges of the models are held out. One thread a process. Scatter: between the slowest "
        "and the fastest round, in parts of the median.",
        "",
        "| model | ranks | rate | plan | ms measured | predicted | error | scatter | load |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in timed:
        lines.append(
            f"| {row['model']} | {row['ranks']} | {row['rate']} | {row['plan']} | {1000 * row['measured_s']:.1f} | "
            f"{1000 * row['predicted_step_s']:.1f} | {100 * row['time_error']:+.0f} % | {100 * row['scatter']:.0f} % | "
            f"{row['load']:.1f} |"
        )
    lines += ["", "| model | ranks | plan | MB measured | predicted | error |", "|---|---|---|---|---|---|"]
    for row in large:
        lines.append(
            f"| {row['model']} | {row['ranks']} | {row['plan']} | {row['measured_bytes'] / 1e6:.0f} | "
            f"{row['predicted_memory_bytes'] / 1e6:.0f} | {100 * row['memory_error']:+.0f} % |"
        )
    lines += ["", "| model | ranks | rate | first choice | best measured | slower by |", "|---|---|---|---|---|---|"]
    for choice in choices:
        lines.append(
            f"| {choice['model']} | {choice['ranks']} | {choice['rate']} | {choice['chosen']} | {choice['best']} | "
            f"{100 * choice['loss']:.0f} % |"
        )
    steady = [row for row in timed if row["scatter"] <= 0.2]
    lines += [
        "",
        f"Rounds of {len(timed) - len(steady)} cells scatter by more than 20 %; of the others "
        f"{sum(abs(row['time_error']) <= 0.2 for row in steady)} of {len(steady)} are within 20 %.",
        "",
        "Not held out: the rules for memory of sharded weights, of pipelines and of DDP were written after an earlier "
        "run of these cells, and so was the list of costs that the planner knows of. Their values are measured in each "
        "run, on probes and on single processes.",
    ]
    environment = report["environment"]
    lines += [
        "",
        f"Environment: `{json.dumps(environment['versions'])}`, {environment['cpu']}, {environment['num_cpus']} CPUs.",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure the grid and write the report; 2 where it cannot run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--rates", nargs="*", default=["100mbit", "1gbit"], help="as tc writes it")
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--timeout", type=float, default=300, help="seconds that one network may take")
    parser.add_argument("--hardware", default=f"{os.cpu_count()}core_{platform.machine().replace('x86_64', 'x86')}")
    parser.add_argument("--date", default=datetime.date.today().isoformat())
    parser.add_argument("--out", type=Path, default=HERE / "reports")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        worker(args.worker, args.rates[0])
        return 0
    if os.geteuid():
        print("planner needs root on Linux: namespaces and rates are made by the kernel", file=sys.stderr)
        return 2
    from efftrain.report.run import environment

    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    machines: dict[str, Any] = {}
    for name in args.models:
        rates = args.rates if name in SMALL else args.rates[-1:]
        for ranks in args.ranks if name in SMALL else args.ranks[:1]:
            for rate in rates:
                with network(ranks, rate):
                    shorten_bucket(ranks, rate)
                    lines = run_ranks(name, ranks, rate, args.timeout)
                rows += judge(name, ranks, rate, lines)
                machines |= {f"{name} {ranks} {rate}": line["hardware"] for line in lines if "hardware" in line}
    path = args.out / f"planner_{args.hardware}_{args.date}"
    command = f"python -m benchmarks.planner --ranks {' '.join(map(str, args.ranks))} --rates {' '.join(args.rates)}"
    if set(args.models) != set(MODELS) and Path(f"{path}.json").exists():  # of the others, what was measured before
        before = json.loads(Path(f"{path}.json").read_text(encoding="utf-8"))
        rows = sorted(
            [row for row in before["rows"] if row["model"] not in args.models] + rows,
            key=lambda row: list(MODELS).index(row["model"]),
        )
        machines = before["hardware"] | machines
        command = f"{before['command']}` of {before['date']}, then `{command} --models {' '.join(args.models)}"
    report = {
        "command": command,
        "date": args.date,
        "rows": rows,
        "choices": first_choices([row for row in rows if row["model"] in SMALL]),
        "hardware": machines,
        "environment": environment(),
    }
    Path(f"{path}.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    Path(f"{path}.md").write_text(render(report), encoding="utf-8")
    print(f"{path}.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())

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
from efftrain.compression import format_codec, parse_codec
from efftrain.config.load import from_dict
from efftrain.errors import ConfigError
from efftrain.models import build_model
from efftrain.parallel import Plan, mesh
from efftrain.parallel.planner import Planner, Setting, describe
from efftrain.parallel.planner.calibrate import calibrate, measure_link
from efftrain.parallel.planner.hardware import Hardware, Link, load_hardware
from efftrain.training import OptimizerConfig

HERE = Path(__file__).parent
WARM_UP = 3
SLICE_S = 1.5
ROUNDS = 8
REPEATS = {False: 2, True: 2}
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


def measured_hardware(name: str) -> Hardware:
    """This machine, and one model on one process."""
    base = replace(load_hardware("laptop_2core"), cores=os.cpu_count() or 1, memory_gib=1e6)
    return calibrate(base, setting(name), rounds=ROUNDS if name in SMALL else 1)


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
    return found


def worker(name: str, rate: str) -> None:
    """One rank: measure the link, then every plan; rank 0 prints."""
    torch.set_num_threads(1)
    with mesh.process_group(timeout_s=120) as device:
        base = load_hardware("laptop_2core").inside
        link = measure_link(mesh.transport(device), base)
        if mesh.rank() == 0:
            print(json.dumps({"link": asdict(link)}), flush=True)
        # All plans in turn, and again: other work does not last. The first of a kind loads code, too.
        for _ in range(REPEATS[name in LARGE]):
            for number, plan in enumerate(plans(name, mesh.world_size(), rate)):
                try:
                    found = measure(name, plan)
                except ConfigError as error:
                    found = {"refused": str(error)}
                if mesh.rank() == 0:
                    print(json.dumps({"number": number, **found}), flush=True)


def measure(name: str, plan: Plan) -> dict[str, Any]:
    """Steps of one plan, and the most memory that a rank took for it beyond what it had before."""
    before = memory_before()
    what = setting(name)
    size = what.batch_size // plan.replicas(mesh.world_size())
    inputs = what.sample.expand(size, *what.sample.shape[1:]).contiguous()
    targets = torch.zeros((size, *(inputs.shape[1:] if inputs.dtype == torch.int64 else ())), dtype=torch.long)
    job = plan.apply(what.model, inputs, optimizer=what.optimizer)
    del what
    times: list[float] = []
    while True:
        started = time.perf_counter()
        job.step(inputs, targets)
        times.append(time.perf_counter() - started)
        enough = sum(times[WARM_UP:]) > SLICE_S or len(times) >= WARM_UP + (300 if name in SMALL else 2)
        # All ranks stop after the same step.
        if len(times) > WARM_UP + 2 and job.exchange.sum([float(enough and mesh.rank() == 0)])[0]:
            break
    peak = status_bytes("VmHWM") - before
    peaks = job.exchange.sum([float(peak) if rank == mesh.rank() else 0.0 for rank in range(mesh.world_size())])
    return {"steps_s": times[WARM_UP:], "memory_bytes": max(peaks), "load": os.getloadavg()[0]}


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


def judge(name: str, ranks: int, rate: str, lines: list[dict[str, Any]], hardware: Hardware) -> list[dict[str, Any]]:
    """Measured beside predicted."""
    if not lines:
        return []
    link = from_dict(Link, lines[0]["link"])
    planner = Planner(setting(name), replace(hardware, inside=link, between=link, ranks_per_node=ranks))
    rows = []
    for number, plan in enumerate(plans(name, ranks, rate)):
        some = [line for line in lines[1:] if line["number"] == number]
        line = some[-1] if some else {"refused": "not run"}
        row: dict[str, Any] = {"model": name, "ranks": ranks, "rate": rate, "codec": format_codec(plan.codec)}
        if "refused" in line:
            continue
        found = planner.predict(plan, ranks)
        row |= {
            "plan": " ".join(
                f"{key}={value}" for key, value in describe(found.plan).items() if value != 1 or key == "data"
            ),
            "measured_s": min(step for one in some for step in one["steps_s"]),
            "median_s": median(step for one in some for step in one["steps_s"]),
            "num_steps": sum(len(one["steps_s"]) for one in some),
            "load": line["load"],
            "link": asdict(link),
            "measured_bytes": line["memory_bytes"],
            **{f"predicted_{key}": value for key, value in found.to_dict().items()},
        }
        row["time_error"] = row["predicted_step_s"] / row["measured_s"] - 1
        row["memory_error"] = row["predicted_memory_bytes"] / row["measured_bytes"] - 1
        rows.append(row)
        print(
            f"{name} {ranks} {rate} {row['plan']}: {1000 * row['measured_s']:.0f} ms measured, "
            f"{1000 * row['predicted_step_s']:.0f} predicted ({row['time_error']:+.0%}); "
            f"{row['measured_bytes'] / 1e6:.1f} MB, {row['predicted_memory_bytes'] / 1e6:.1f} "
            f"({row['memory_error']:+.0%})",
            {k: round(1000 * v) for k, v in row["predicted_time"].items()},
            file=sys.stderr,
            flush=True,
        )
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
        f"Measured: the fastest step of {REPEATS[False]} times {SLICE_S:g} s, {WARM_UP} steps before each left out, "
        "since other work on the machine disturbs the median (the load average is beside it); memory is the growth of "
        "the resident set at its peak, of the rank with the largest. "
        "Times are judged of the small models, whose steps find a quiet moment, memory of the large ones. "
        "Calibrated on one process for each model, and the link of each network. One thread a process.",
        "",
        "| model | ranks | rate | plan | ms measured | median | predicted | error | load |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in timed:
        lines.append(
            f"| {row['model']} | {row['ranks']} | {row['rate']} | {row['plan']} | {1000 * row['measured_s']:.0f} | "
            f"{1000 * row['median_s']:.0f} | {1000 * row['predicted_step_s']:.0f} | {100 * row['time_error']:+.0f} % | "
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
    environment = report["environment"]
    lines += [
        "",
        "Not held out: the rules for memory of sharded weights and of pipelines, and for torch's own calls on the "
        "sharded axis, were written after an earlier run of these cells.",
    ]
    if any(row["load"] > environment["num_cpus"] + row["ranks"] for row in timed):
        lines += [
            "",
            "The machine did other work than this, more than it has cores for: steps that compute were slowed by what "
            "no prediction knows of. Repeat it on a quiet machine before the times are taken for the planner's error.",
        ]
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
        hardware = measured_hardware(name)
        rates = args.rates if name in SMALL else args.rates[-1:]
        machines[name] = asdict(hardware)
        print(name, {k: v for k, v in machines[name].items() if isinstance(v, float)}, file=sys.stderr, flush=True)
        for ranks in args.ranks if name in SMALL else args.ranks[:1]:
            for rate in rates:
                with network(ranks, rate):
                    rows += judge(name, ranks, rate, run_ranks(name, ranks, rate, args.timeout), hardware)
    report = {
        "command": f"python -m benchmarks.planner --ranks {' '.join(map(str, args.ranks))} "
        f"--rates {' '.join(args.rates)}",
        "date": args.date,
        "rows": rows,
        "choices": first_choices([row for row in rows if row["model"] in SMALL]),
        "hardware": machines,
        "environment": environment(),
    }
    path = args.out / f"planner_{args.hardware}_{args.date}"
    Path(f"{path}.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    Path(f"{path}.md").write_text(render(report), encoding="utf-8")
    print(f"{path}.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What a Plan costs beside the same plan written by hand in plain torch: step times in pairs, in one run.

Two processes over gloo, one thread each, a character transformer. Both sides take turns step by step, in an order that
changes, each step behind a barrier; the figure is the median of the ratios of the pairs. Besides, what it costs to look
whether all ranks still hold the same weights, which a job does every 100 steps.

    python benchmarks/plan_overhead.py --pairs 40
"""

import argparse
import datetime
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from efftrain.training import StepConfig

HERE = Path(__file__).parent
MODEL = {"width": 256, "depth": 4, "heads": 4, "context": 64}
BATCH, WARM_UP, GOAL = 16, 4, 1.02
EVERY = StepConfig().check_replicas_every
CASES = ("data", "shard", "tensor", "pipeline")


def by_hand(case: str) -> Callable[[Any, Any], None]:
    """One step of torch alone."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
    from torch.nn import functional as F
    from torch.nn.parallel import DistributedDataParallel

    from efftrain.models import build_model
    from efftrain.parallel.stages import cut_model

    torch.manual_seed(0)
    model: Any = build_model("char-transformer", **MODEL)
    rank, size = dist.get_rank(), dist.get_world_size()
    share = BATCH // size

    def loss_of(logits: Any, targets: Any) -> Any:
        return F.cross_entropy(logits.flatten(0, -2), targets.flatten())

    def optimizer_of(parameters: Any) -> Any:
        return torch.optim.SGD(parameters, lr=0.01, momentum=0.9, foreach=False)

    if case == "pipeline":
        cut = cut_model(model, torch.zeros(BATCH // 4, MODEL["context"], dtype=torch.int64), 2)[rank].build(model)
        schedule = Schedule1F1B(PipelineStage(cut, rank, size, torch.device("cpu")), n_microbatches=4, loss_fn=loss_of)
        optimizer = optimizer_of(cut.parameters())

        def pipeline_step(inputs: Any, targets: Any) -> None:
            optimizer.zero_grad()
            losses: list[Any] = []
            schedule.step(*((inputs,) if rank == 0 else ()), target=targets if rank else None, losses=losses)
            optimizer.step()
            if losses:
                torch.stack(losses).mean().item()

        return pipeline_step
    if case == "data":
        model = DistributedDataParallel(model)
    elif case == "shard":
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
    else:
        styles: dict[str, Any] = {
            name: RowwiseParallel(input_layouts=Replicate()) for name in ("embedding", "positions")
        }
        for i in range(MODEL["depth"]):
            styles |= {f"blocks.{i}.attention.{name}": ColwiseParallel() for name in ("query", "key", "value")}
            styles |= {f"blocks.{i}.attention.out": RowwiseParallel(), f"blocks.{i}.up": ColwiseParallel()}
            styles[f"blocks.{i}.down"] = RowwiseParallel()
        parallelize_module(model, init_device_mesh("cpu", (size,)), styles)
    optimizer = optimizer_of(model.parameters())
    mine = slice(None) if case == "tensor" else slice(rank * share, (rank + 1) * share)

    def step(inputs: Any, targets: Any) -> None:
        optimizer.zero_grad()
        loss = loss_of(model(inputs[mine]), targets[mine])
        loss.backward()
        optimizer.step()
        loss.item()

    return step


def by_plan(case: str) -> tuple[Callable[[Any, Any], None], Callable[[], None]]:
    """The same through a Plan, and a look at the replicas."""
    import torch

    from efftrain.models import build_model
    from efftrain.parallel import Plan
    from efftrain.training import OptimizerConfig

    plans = {
        "data": Plan(),
        "shard": Plan(shard="full"),
        "tensor": Plan(tensor=2, tensor_styles={"head": "whole"}),
        "pipeline": Plan(pipeline=2, microbatches=4),
    }
    torch.manual_seed(0)
    job = plans[case].apply(
        build_model("char-transformer", **MODEL),
        torch.zeros(BATCH, MODEL["context"], dtype=torch.int64),
        optimizer=OptimizerConfig(lr=0.01, momentum=0.9, schedule="constant"),
    )

    def step(inputs: Any, targets: Any) -> None:
        job.step(*job.share(inputs, targets))

    return step, lambda: job.exchange.check_replicas(job.model)


def worker(case: str, pairs: int) -> None:
    """One rank: both sides in turns; rank 0 prints the times."""
    import torch
    import torch.distributed as dist

    from efftrain.parallel import mesh

    def compare() -> None:
        tokens = torch.randint(0, 256, (BATCH, MODEL["context"] + 1), generator=torch.Generator().manual_seed(1))
        plan, look = by_plan(case)
        sides = {"by hand": by_hand(case), "plan": plan}
        times: dict[str, list[float]] = {name: [] for name in sides}
        cpu: dict[str, list[float]] = {name: [] for name in sides}
        order = random.Random(0)
        for number in range(WARM_UP + pairs):
            names = list(sides)
            order.shuffle(names)
            for name in names:
                dist.barrier()
                started, cpu_started = time.perf_counter(), time.process_time()
                sides[name](tokens[:, :-1], tokens[:, 1:])
                dist.barrier()
                if number >= WARM_UP:
                    times[name].append(time.perf_counter() - started)
                    cpu[name].append(time.process_time() - cpu_started)
        looks = []
        for _ in range(WARM_UP + pairs):
            dist.barrier()
            started = time.perf_counter()
            look()
            looks.append(time.perf_counter() - started)
        if dist.get_rank() == 0:
            print(json.dumps({"times": times, "cpu": cpu, "looks": looks[WARM_UP:]}))

    torch.set_num_threads(1)
    with mesh.process_group():
        compare()


def measure(case: str, pairs: int) -> dict[str, Any]:
    """Start two ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    done = subprocess.run(
        [*command, "--worker", case, "--pairs", str(pairs)],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    found = json.loads(done.stdout.strip().splitlines()[-1])
    times = found["times"]
    ratios, cpu = (
        [ours / theirs for ours, theirs in zip(found[kind]["plan"], found[kind]["by hand"], strict=True)]
        for kind in ("times", "cpu")
    )
    low, _, high = quantiles(ratios, n=4)
    return {
        "plan_ms": 1000 * median(times["plan"]),
        "by_hand_ms": 1000 * median(times["by hand"]),
        "ratio": median(ratios),
        "quartiles": [low, high],
        "cpu_ratio": median(cpu),
        "look_ms": 1000 * median(found["looks"]),
        "look_share": median(found["looks"]) / (EVERY * median(times["plan"])),
    }


def main() -> None:
    """All cases, and the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--worker", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=HERE / "reports")
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker, arguments.pairs)
        return
    arguments.out.mkdir(parents=True, exist_ok=True)  # before the minutes that a report takes, not after
    import torch

    found = {case: measure(case, arguments.pairs) for case in CASES}
    report = {
        "command": f"python benchmarks/plan_overhead.py --pairs {arguments.pairs}",
        "model": MODEL,
        "batch": BATCH,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "num_cpus": os.cpu_count(),
        "goal": GOAL,
        "cases": found,
    }
    name = f"plan_overhead_{os.cpu_count()}core_x86_{datetime.date.today().isoformat()}"
    (arguments.out / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    lines = [
        "# A Plan beside the same plan by hand",
        "",
        f"`{report['command']}`, torch {torch.__version__}, {os.cpu_count()} cores, two gloo processes of one thread, "
        f"character transformer {MODEL}, batch {BATCH}. Goal: a ratio of at most {GOAL}.",
        "",
        "| plan | by hand, ms a step | Plan, ms a step | ratio, median of the pairs | quartiles | ratio of CPU time "
        f"| look at the replicas, ms | share of {EVERY} steps |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case, one in found.items():
        times = f"{one['by_hand_ms']:.1f} | {one['plan_ms']:.1f}"
        low, high = one["quartiles"]
        look = f"{one['look_ms']:.2f} | {one['look_share']:.3%}"
        ratio = f"{one['ratio']:.3f} | {low:.3f} to {high:.3f} | {one['cpu_ratio']:.3f}"
        lines.append(f"| {case} | {times} | {ratio} | {look} |")
    lines += [
        "",
        "A Plan also asks all ranks once a step whether loss and gradient are finite, and returns their norm. Its "
        "gradients of the data axis are views of DDP's buckets, which saves the copy back (`gradient_as_bucket_view`).",
    ]
    (arguments.out / f"{name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

"""The recipe for eight GPUs on one: step time, tokens a second, model FLOP utilization, and memory against the planner.

Trains ``parallel/recipes/char_lm_8gpu.toml`` (114 million parameters) with its own plan, bf16 and compiled blocks, for
some steps on one GPU. Not run yet on the machines at hand, which have none.

    python benchmarks/gpu_lm.py
    python benchmarks/gpu_lm.py --set model.options.width=1024 --set model.options.heads=16

A token costs ``6 N + 12 L H Q T`` FLOPs, forward and backward: ``N`` parameters of matrix products (embedding and
positions are looked up), ``L`` layers, ``H`` heads of size ``Q``, ``T`` tokens a sequence; what checkpointing computes
again is not counted, and neither is that half of the attention is masked. Source: Chowdhery et al., PaLM
(arXiv:2204.02311), appendix B. Exit status 2 without CUDA.
"""

import argparse
import datetime
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
import torch
from torch import nn

from efftrain.config import load_recipe, to_dict
from efftrain.data import load_dataset
from efftrain.models import build_model
from efftrain.parallel import ClusterRecipe
from efftrain.parallel.planner import Planner, load_hardware, setting_of
from efftrain.report.run import environment
from efftrain.training import Job, set_seed

HERE = Path(__file__).parent
RECIPE = HERE.parent / "parallel" / "recipes" / "char_lm_8gpu.toml"
WARM_UP = 10  # the first one compiles

# Dense bf16 TFLOP/s of the tensor cores, from NVIDIA's data sheets of these cards (which give twice as much "with
# sparsity"); the first name that is in the device's own counts.
PEAK_TFLOPS = {
    "H200": 989.0,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
}


def peak_of(device_name: str) -> float | None:
    """In TFLOP/s; ``None`` for a device that is not in the table."""
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in device_name), None)


def flops_per_token(model: nn.Module, depth: int, width: int, context: int) -> int:
    """Forward and backward. ``H Q`` is the width."""
    looked_up = sum(model.get_parameter(f"{name}.weight").numel() for name in ("embedding", "positions"))
    matrices = sum(p.numel() for p in model.parameters()) - looked_up
    return 6 * matrices + 12 * depth * width * context


def times_of(job: Job, data: Any, batch_size: int, num_steps: int) -> list[float]:
    """Seconds of each step after the warm-up; reading the loss waits for the GPU."""
    found = []
    for step in range(WARM_UP + num_steps):
        if step == WARM_UP and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()  # compiling takes memory of its own
        indices = (np.arange(batch_size) + step * batch_size) % len(data)
        batch = [torch.from_numpy(part) for part in data.batch(indices)]
        start = time.perf_counter()
        job.step(*batch)
        found.append(time.perf_counter() - start)
    return found[WARM_UP:]


def measure(recipe: ClusterRecipe, num_steps: int, device: torch.device) -> dict[str, Any]:
    """One process, whose plan is the recipe's: on one rank nothing is sharded."""
    set_seed(recipe.seed, 0, deterministic=recipe.loop.deterministic)
    plan = recipe.parallel.plan()
    hardware = replace(load_hardware("h100x8_400gbit"), memory_gib=1e6)  # how much it needs, not whether it fits
    predicted = Planner(setting_of(recipe), hardware).predict(replace(plan, shard="none"), 1).memory.total
    model = build_model(recipe.model.name, **recipe.model.options)
    config: Any = model.config
    flops = flops_per_token(model, config.depth, config.width, config.context)
    data = load_dataset(recipe.data.name, "train", **recipe.data.options)
    job = plan.apply(model.to(device), optimizer=recipe.optimizer, step=recipe.step)
    times = times_of(job, data, recipe.loop.batch_size, num_steps)
    tokens = recipe.loop.batch_size * config.context / median(times)
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else "CPU"
    peak = peak_of(name)
    return {
        "device": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "step_s": median(times),
        "step_s_spread": list(quantiles(times, n=20)[::18]),
        "tokens_per_s": tokens,
        "flops_per_token": flops,
        "mfu": None if peak is None else tokens * flops / (peak * 1e12),
        "peak_tflops": peak,
        "memory_bytes": torch.cuda.max_memory_allocated(device) if on_gpu else None,
        "predicted_bytes": predicted,
    }


def render(found: dict[str, Any], command: str) -> str:
    """The Markdown report."""
    mfu, memory = found["mfu"], found["memory_bytes"]
    low, high = found["step_s_spread"]
    rows = [
        f"| parameters | {found['parameters']:,} |",
        f"| step, median (5 % to 95 %) | {1e3 * found['step_s']:.1f} ms ({1e3 * low:.1f} to {1e3 * high:.1f}) |",
        f"| tokens a second | {found['tokens_per_s']:,.0f} |",
        f"| FLOPs a token | {found['flops_per_token']:,} |",
        f"| MFU of {found['peak_tflops']} TFLOP/s | {'-' if mfu is None else f'{100 * mfu:.1f} %'} |",
        f"| memory, allocated at most | {'-' if memory is None else f'{memory / 2**30:.2f} GiB'} |",
        f"| memory, predicted | {found['predicted_bytes'] / 2**30:.2f} GiB |",
    ]
    head = [f"# A language model on one {found['device']}", "", f"`{command}`", "", "| | |", "|---|---|"]
    return "\n".join([*head, *rows, ""])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50, help="steps measured, at least 2")
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--date", default=datetime.date.today().isoformat())
    parser.add_argument("--out", type=Path, default=HERE / "reports")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks/gpu_lm.py needs a CUDA GPU, which torch does not see here", file=sys.stderr)
        return 2
    changes = [f"step.micro_batches={args.micro_batches}", "parallel.compile=true", *args.set]
    recipe = load_recipe(ClusterRecipe, RECIPE, changes)
    found = measure(recipe, args.steps, torch.device("cuda"))
    report = {**found, "recipe": to_dict(recipe), "environment": environment()}
    words = [f"--steps {args.steps}", f"--micro-batches {args.micro_batches}", *(f"--set {one}" for one in args.set)]
    text = render(found, f"python benchmarks/gpu_lm.py {' '.join(words)}")
    path = args.out / f"gpu_lm_{found['device'].replace(' ', '_')}_{args.date}"
    path.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

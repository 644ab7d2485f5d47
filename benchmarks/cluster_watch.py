"""Compressed against uncompressed gradients on two workers: accuracy over seeds, and bytes on the wire.

The act 1 of the demo, for several seeds: the same recipe, once with ``Identity`` and once with the codec, on two
torchrun workers. A third row adds momentum correction, which this task does not need.

    python benchmarks/cluster_watch.py --seeds 3
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

from efftrain.report.run import environment

HERE = Path(__file__).parent
RECIPE = HERE.parent / "parallel" / "recipes" / "watch_ddp_topk.toml"
DATA = ("data.options.people=8", "data.options.train_share=0.2", "loop.epochs=40")
MODES = {
    "uncompressed": ("parallel.codec=Identity()",),
    "compressed": (),
    "with momentum correction": ("parallel.momentum_correction=true",),
}


def train(seed: int, changes: tuple[str, ...], out: str) -> dict[str, Any]:
    """One run on two workers; what its ``result.json`` holds."""
    settings = [part for change in (f"seed={seed}", *DATA, *changes) for part in ("--set", change)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, "-m", "efftrain", "train", str(RECIPE), *settings, "--out", out, "--json"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"run failed:\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def render(report: dict[str, Any], command: str) -> str:
    """The Markdown report."""
    rows = []
    for name, mode in report["modes"].items():
        accuracies = ", ".join(f"{100 * a:.1f}" for a in mode["accuracy"])
        rows.append(
            f"| {name} | `{mode['codec']}` | {100 * mean(mode['accuracy']):.1f} | {accuracies} | "
            f"{mode['wire_bytes'] / 1e6:.2f} | {mode['ratio']:.1f}x |"
        )
    lines = [
        "# Gradient compression on the watch data, two workers",
        "",
        f"`{command}`",
        "",
        "watch-cnn, first 20 % of every recording of 8 people, 40 epochs, test on their last 30 %; recipe "
        "`parallel/recipes/watch_ddp_topk.toml`. Bytes are sent by each rank, after encoding; the ring all-reduce of "
        "fp32 gradients is the unit of the ratio. Accuracy in %.",
        "",
        "| mode | codec | accuracy, mean | each seed | MB sent | fewer bytes |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        f"Spread of the control's seeds: {100 * report['control_spread']:.1f} points. "
        f"Compressed minus control, means: {100 * report['difference']:+.1f} points.",
        "",
        "## Claims",
        "",
        *(f"- {'holds' if holds else 'BROKEN'}: {text}" for text, holds in report["claims"].items()),
        "",
        "Environment: `" + json.dumps(report["environment"]["versions"]) + "`, "
        f"{report['environment']['cpu']}, {report['environment']['num_cpus']} CPUs.",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run all modes and seeds, write the report; 1 if a claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--hardware", default=f"{os.cpu_count()}core_{platform.machine().replace('x86_64', 'x86')}")
    parser.add_argument("--date", default=datetime.date.today().isoformat())
    parser.add_argument("--out", type=Path, default=HERE / "reports")
    args = parser.parse_args()
    modes: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, changes in MODES.items():
            runs = [train(seed, changes, folder) for seed in range(args.seeds)]
            modes[name] = {
                "codec": runs[0]["codec"],
                "accuracy": [run["accuracy"] for run in runs],
                "wire_bytes": runs[0]["wire_bytes"],
                "ratio": runs[0]["uncompressed_bytes"] / runs[0]["wire_bytes"],
            }
            print(name, [round(100 * a, 1) for a in modes[name]["accuracy"]], file=sys.stderr, flush=True)
    control, compressed = modes["uncompressed"], modes["compressed"]
    spread = max(control["accuracy"]) - min(control["accuracy"])
    difference = mean(compressed["accuracy"]) - mean(control["accuracy"])
    report = {
        "modes": modes,
        "control_spread": spread,
        "difference": difference,
        "claims": {
            "mean accuracy within the spread of the control's seeds": -difference <= spread,
            "at least 20x fewer bytes on the wire": compressed["ratio"] >= 20,
        },
        "recipe": RECIPE.read_text(encoding="utf-8"),
        "environment": environment(),
    }
    path = args.out / f"cluster_watch_{args.hardware}_{args.date}"
    command = f"python benchmarks/cluster_watch.py --seeds {args.seeds}"
    path.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(render(report, command), encoding="utf-8")
    print(path.with_suffix(".md"))
    return 0 if all(report["claims"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())

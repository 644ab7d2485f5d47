"""Claim: on a mix of fast and slow devices, buffered updates reach the accuracy of synchronous rounds in less time.

``python benchmarks/federated_fedbuff.py`` runs ``federated/recipes/fedbuff_mixed_devices.toml`` in virtual time: as it
is, and with the same devices in synchronous rounds of 30 clients, with over-selection and without. The target is the
accuracy that the synchronous run has after its last round, less one point. It writes a report, and exits with 1 if the
claim does not hold. Virtual times come from the device profiles, so they repeat exactly on any machine.
"""

import argparse
import datetime
import json
import os
import platform
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from efftrain.config import load_recipe, to_dict
from efftrain.federated import FederatedRecipe, FederatedResult, run_federated
from efftrain.federated.flower import VERSION
from efftrain.federated.recipe import FedBuffConfig

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "federated" / "recipes" / "fedbuff_mixed_devices.toml"
LEAST_SPEEDUP = 1.5
POINT = 0.01


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30, help="of the synchronous run")
    parser.add_argument("--updates", type=int, default=150, help="of the buffered run, at most")
    parser.add_argument("--engine", default="device", choices=("torch", "device"))
    parser.add_argument("--report", type=Path, help="write PATH.md and PATH.json instead of the default")
    args = parser.parse_args()
    torch.set_num_threads(1)
    shipped = load_recipe(FederatedRecipe, RECIPE)
    base = replace(shipped, client=replace(shipped.client, engine=args.engine))
    buffered = replace(base, server=replace(base.server, rounds=args.updates, evaluate_every=3))
    sync = replace(base, fedbuff=FedBuffConfig(), server=replace(base.server, rounds=args.rounds, evaluate_every=1))
    over = replace(sync, server=replace(sync.server, over_select=True))
    results: dict[str, FederatedResult] = {}
    for name, recipe in (("synchronous", sync), ("synchronous, over-selection", over), ("buffered", buffered)):
        results[name] = run_federated(recipe)
        last = results[name].rounds[-1]
        print(f"{name}: {last.accuracy:.4f} after {last.virtual_s:.1f} virtual s", file=sys.stderr)
    target = results["synchronous"].accuracy - POINT
    rows = {name: until(result, target) for name, result in results.items()}
    times = [rows[name]["virtual_s"] for name in results]
    known = [seconds for seconds in times[:2] if seconds is not None]
    speedup = None if times[2] is None else min(known) / times[2]
    holds = speedup is not None and speedup >= LEAST_SPEEDUP
    claim = {"claim": "virtual time to the target", "measured": speedup, "at_least": LEAST_SPEEDUP, "holds": holds}
    report = {
        "date": str(datetime.date.today()),
        "command": f"python benchmarks/federated_fedbuff.py --rounds {args.rounds} --updates {args.updates} "
        f"--engine {args.engine}",
        "recipe": to_dict(buffered),
        "target": target,
        "rows": rows,
        "claims": [claim],
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "flwr": VERSION},
    }
    path = args.report or ROOT / "benchmarks" / "reports" / f"federated_fedbuff_{_hardware()}_{datetime.date.today()}"
    path.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown(report), encoding="utf-8")
    print(json.dumps([claim]))
    return 0 if holds else 1


def until(result: FederatedResult, target: float) -> dict[str, Any]:
    """What it took to reach the target."""
    joules, trainings = 0.0, 0
    for one in result.rounds:
        joules += one.energy_j or 0.0
        trainings += one.clients_trained
        if one.measured and one.accuracy >= target:
            return {
                "virtual_s": one.virtual_s,
                "updates": one.round,
                "trainings": trainings,
                "energy_j": joules,
                "accuracy": result.accuracy,
            }
    return {"virtual_s": None, "updates": None, "trainings": None, "energy_j": None, "accuracy": result.accuracy}


def markdown(report: dict[str, Any]) -> str:
    lines = [
        "# Virtual time to an accuracy: synchronous rounds against buffered updates",
        "",
        f"`{report['command']}`, {report['date']}: 300 clients on three kinds of devices, 30 training at a time, "
        f"Dirichlet 0.3. Target {report['target']:.4f}: the last accuracy of the synchronous run less one point.",
        "",
        "| way | virtual s to the target | model updates | trainings | joules | accuracy at the end |",
        "|---|---|---|---|---|---|",
    ]
    for name, one in report["rows"].items():
        if one["virtual_s"] is None:
            lines.append(f"| {name} | not reached | - | - | - | {one['accuracy']:.4f} |")
            continue
        lines.append(
            f"| {name} | {one['virtual_s']:.1f} | {one['updates']} | {one['trainings']} | {one['energy_j']:.0f} | "
            f"{one['accuracy']:.4f} |"
        )
    speedup = report["claims"][0]["measured"]
    found = (
        "The target was not reached." if speedup is None else f"**{speedup:.2f}x** less than the faster of the others."
    )
    lines += ["", found, "", "Versions: " + ", ".join(f"{n} {v}" for n, v in report["versions"].items()) + "."]
    return "\n".join(lines) + "\n"


def _hardware() -> str:
    return f"{os.cpu_count()}core_{'x86' if platform.machine() == 'x86_64' else platform.machine()}"


if __name__ == "__main__":
    sys.exit(main())

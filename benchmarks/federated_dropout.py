"""Claim: clients that vanish in mid-round cost little accuracy: 10 % of them at most 0.5 points, 30 % at most 1.5.

``python benchmarks/federated_dropout.py`` runs ``federated/recipes/fashion_100.toml`` (100 clients, Dirichlet 0.3, a
tenth of the update in 8 bits with error feedback) with 300 samples a client on the ``device`` engine, with no drop-out,
10 % and 30 %, each with three seeds. A client that drops out in one round is asked again in the next. Accuracy is
the mean over the last five rounds on the 10,000 test images, for it still moves from one round to the next. It writes a
report, and exits with 1 if the claim does not hold.
"""

import argparse
import datetime
import json
import os
import platform
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from efftrain.config import load_recipe, to_dict
from efftrain.federated import FederatedRecipe, run_federated
from efftrain.federated.flower import VERSION

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "federated" / "recipes" / "fashion_100.toml"
LIMITS = {0.1: 0.5, 0.3: 1.5}
"""Share that drops out -> points of accuracy that it may cost."""
LAST = 5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--samples", type=int, default=300, help="of a client")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--report", type=Path, help="write PATH.md and PATH.json instead of the default")
    args = parser.parse_args()
    torch.set_num_threads(1)
    shipped = load_recipe(FederatedRecipe, RECIPE)
    base = replace(
        shipped,
        data=replace(shipped.data, samples_per_client=args.samples),
        client=replace(shipped.client, engine="device"),
        server=replace(shipped.server, rounds=args.rounds),
    )
    rows: dict[float, list[dict[str, float]]] = {}
    for seed in range(args.seeds):
        for share in (0.0, *LIMITS):
            recipe = replace(base, seed=seed, fleet=replace(base.fleet, drop_out=share))
            rows.setdefault(share, []).append(one_run(recipe))
            print(f"seed {seed}, {share:.0%} drop out: {rows[share][-1]}", file=sys.stderr)
    lost = {
        share: [none["accuracy"] - row["accuracy"] for none, row in zip(rows[0.0], rows[share], strict=True)]
        for share in LIMITS
    }
    claims = [
        {
            "claim": f"points of accuracy lost to {share:.0%} drop-out, mean of {args.seeds} seeds",
            "measured": 100 * mean(lost[share]),
            "seeds": [100 * one for one in lost[share]],
            "at_most": limit,
            "holds": 100 * mean(lost[share]) <= limit,
        }
        for share, limit in LIMITS.items()
    ]
    report = {
        "date": str(datetime.date.today()),
        "command": f"python benchmarks/federated_dropout.py --rounds {args.rounds} --samples {args.samples} "
        f"--seeds {args.seeds}",
        "recipe": to_dict(base),
        "rows": {f"{share:g}": found for share, found in rows.items()},
        "claims": claims,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "flwr": VERSION},
    }
    path = args.report or ROOT / "benchmarks" / "reports" / f"federated_dropout_{_hardware()}_{datetime.date.today()}"
    path.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown(report), encoding="utf-8")
    print(json.dumps(claims))
    return 0 if all(claim["holds"] for claim in claims) else 1


def one_run(recipe: FederatedRecipe) -> dict[str, float]:
    result = run_federated(recipe)
    asked = sum(one.clients_selected for one in result.rounds)
    return {
        "accuracy": mean(result.accuracy_per_round[-LAST:]),
        "spread": stdev(result.accuracy_per_round[-LAST:]),
        "dropped": result.total("clients_dropped") / asked,
    }


def markdown(report: dict[str, Any]) -> str:
    recipe = report["recipe"]
    lines = [
        "# What drop-out in mid-round costs",
        "",
        f"`{report['command']}`, {report['date']}: `fashion_100` with {recipe['data']['samples_per_client']} samples a "
        f"client and the `device` engine, {recipe['server']['rounds']} rounds, Dirichlet {recipe['data']['alpha']:g}, "
        f"codec `{recipe['uplink']['codec']}` with error feedback. Accuracy on 10,000 test images, mean of the last "
        f"{LAST} rounds; in brackets how far it moves from round to round among these (standard deviation).",
        "",
        "| drop out | share that did | "
        + " | ".join(f"seed {i}" for i in range(len(report["rows"]["0"])))
        + " | mean |",
        "|---" * (3 + len(report["rows"]["0"])) + "|",
    ]
    for share, rows in report["rows"].items():
        cells = [f"{100 * one['accuracy']:.2f} % ({100 * one['spread']:.2f})" for one in rows]
        average = 100 * mean(one["accuracy"] for one in rows)
        dropped = 100 * mean(one["dropped"] for one in rows)
        lines.append(f"| {100 * float(share):.0f} % | {dropped:.1f} % | {' | '.join(cells)} | {average:.2f} % |")
    lines += ["", "| claim | measured | of each seed | at most | holds |", "|---|---|---|---|---|"]
    for one in report["claims"]:
        seeds = ", ".join(f"{value:.2f}" for value in one["seeds"])
        holds = "yes" if one["holds"] else "**no**"
        lines.append(f"| {one['claim']} | {one['measured']:.2f} | {seeds} | {one['at_most']:g} | {holds} |")
    lines += ["", "Versions: " + ", ".join(f"{name} {version}" for name, version in report["versions"].items()) + "."]
    return "\n".join(lines) + "\n"


def _hardware() -> str:
    return f"{os.cpu_count()}core_{'x86' if platform.machine() == 'x86_64' else platform.machine()}"


if __name__ == "__main__":
    sys.exit(main())

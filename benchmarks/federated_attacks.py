"""What poisoned clients do to each aggregation rule: a table of rule x attack x split.

Fashion-MNIST over a few clients that all take part in every round, one in five of them an attacker; accuracy of the
global model on the whole test set, measured by the server after the last round. The gate's norm limit is opened wide,
so that the rules stand alone; one row has it at work in front of the mean. All runs of a split share seeds and data.

    OMP_NUM_THREADS=1 python benchmarks/federated_attacks.py --seeds 1 --partial runs/attacks.jsonl
"""

import argparse
import datetime
import itertools
import json
import os
import platform
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from efftrain.config import dump_toml
from efftrain.errors import RoundError
from efftrain.federated import FederatedRecipe, run_federated
from efftrain.federated.recipe import (
    AttackConfig,
    ClientConfig,
    DataConfig,
    FleetConfig,
    GateConfig,
    ModelConfig,
    RoundsConfig,
    UplinkConfig,
)

CLIENTS, SHARE = 25, 0.2
EVIL = round(CLIENTS * SHARE)
Options = dict[str, int | float | str | bool]
RULES: dict[str, tuple[str, Options]] = {
    "mean": ("fedavg", {}),
    "mean behind the gate": ("fedavg", {}),
    "norm_bounded_mean": ("norm_bounded_mean", {}),
    "median": ("median", {}),
    "trimmed_mean": ("trimmed_mean", {"share": SHARE}),
    "krum": ("krum", {"num_malicious": EVIL}),
    "multi_krum": ("multi_krum", {"num_malicious": EVIL, "num_selected": CLIENTS - EVIL - 2}),
    "bulyan": ("bulyan", {"num_malicious": EVIL}),
    "geometric_median": ("geometric_median", {}),
    "bucketing, geometric_median": ("bucketing", {"size": 2, "rule": "geometric_median"}),
}
ATTACKS = ("none", "sign_flip", "scale", "label_flip", "alie")
SPLITS = {"IID": {"partition": "iid"}, "Dirichlet 0.3": {"partition": "dirichlet", "alpha": 0.3}}
LEFT_OUT = {("Dirichlet 0.3", "bulyan")}
"""A run of bulyan takes minutes: Flower's partitions all clients' weights one by one."""
RECOMMENDED = "geometric_median"
MOST_LOST, LEAST_FAILED = 0.03, 0.2
GATE_NORM = 3.0

BASE = FederatedRecipe(
    name="attacks",
    model=ModelConfig(name="fashion-cnn"),
    client=ClientConfig(engine="device", epochs=1, batch_size=10, lr=0.1),
    server=RoundsConfig(rounds=12, evaluate="server", evaluate_every=12),
    uplink=UplinkConfig(codec="Identity()", feedback=False),
    gate=GateConfig(max_update_norm=1e6),
    fleet=FleetConfig(workers=2),
)


def recipe(rule: str, attack: str, split: str, seed: int) -> FederatedRecipe:
    name, options = RULES[rule]
    data = DataConfig(name="fashion-mnist", clients=CLIENTS, samples_per_client=200, **SPLITS[split])  # type: ignore[arg-type]
    return replace(
        BASE,
        seed=seed,
        data=data,
        server=replace(BASE.server, strategy=name, strategy_options=options),
        gate=GateConfig(max_update_norm=GATE_NORM) if rule == "mean behind the gate" else BASE.gate,
        attack=AttackConfig(kind=attack, share=SHARE),  # type: ignore[arg-type]
    )


def accuracy_of(rule: str, attack: str, split: str, seed: int) -> float:
    """NaN if the run ended because no round could be closed."""
    try:
        return run_federated(recipe(rule, attack, split, seed)).accuracy
    except RoundError:
        return float("nan")


def run(seeds: int, partial: Path | None) -> dict[str, dict[str, dict[str, list[float]]]]:
    """All runs that are not in ``partial`` yet; each is written there as soon as it is done."""
    done: dict[tuple[str, str, str, int], float] = {}
    for line in partial.read_text(encoding="utf-8").splitlines() if partial and partial.exists() else ():
        split, rule, attack, seed, accuracy = json.loads(line)
        done[split, rule, attack, seed] = accuracy
    table: dict[str, dict[str, dict[str, list[float]]]] = {}
    for split, rule, attack, seed in itertools.product(SPLITS, RULES, ATTACKS, range(seeds)):
        if (split, rule) in LEFT_OUT:
            continue
        key = (split, rule, attack, seed)
        if key not in done:
            start = time.perf_counter()
            done[key] = accuracy_of(rule, attack, split, seed)
            print(f"{split}, {rule}, {attack}: {done[key]:.4f} ({time.perf_counter() - start:.0f} s)", file=sys.stderr)
            if partial:
                with partial.open("a", encoding="utf-8") as file:
                    file.write(json.dumps([*key, done[key]]) + "\n")
        table.setdefault(split, {}).setdefault(rule, {}).setdefault(attack, []).append(done[key])
    return table


def claims(table: dict[str, dict[str, dict[str, list[float]]]]) -> list[dict[str, Any]]:
    iid = {rule: {attack: float(np.mean(v)) for attack, v in row.items()} for rule, row in table["IID"].items()}
    honest = iid["mean"]["none"]
    lost = {attack: honest - iid[RECOMMENDED][attack] for attack in ATTACKS}
    worst = max(lost, key=lambda attack: lost[attack])
    failed = honest - min(iid["mean"].values())
    return [
        {
            "text": f"IID: {RECOMMENDED} loses at most {100 * MOST_LOST:g} points to the unattacked mean under any "
            f"attack (worst: {worst})",
            "value": lost[worst],
            "holds": lost[worst] <= MOST_LOST,
        },
        {
            "text": f"IID: the mean loses at least {100 * LEAST_FAILED:g} points under some attack (the control)",
            "value": failed,
            "holds": failed >= LEAST_FAILED,
        },
    ]


def render(report: dict[str, Any]) -> str:
    lines = [
        "# Poisoned clients against aggregation rules",
        "",
        f"`{report['command']}`, {report['hardware']}. "
        + ", ".join(f"{name} {number}" for name, number in report["versions"].items())
        + ".",
        "",
        f"{CLIENTS} clients, {EVIL} of them attackers, all in every round; 200 Fashion-MNIST images each, fashion-cnn, "
        f"{BASE.server.rounds} rounds. Accuracy (%) on the whole test set after the last round, "
        f"mean over {report['seeds']} seed(s). `scale` is the update times 100. The gate accepts any norm "
        f"but in the row *mean behind the gate*, where at most {GATE_NORM:g} passes. Rules know the number of "
        "attackers where they ask for it. `bulyan` takes minutes a run, so it was left out of one split.",
    ]
    for split, rows in report["table"].items():
        lines += ["", f"## {split}", "", f"| rule | {' | '.join(ATTACKS)} |", "|---" * (len(ATTACKS) + 1) + "|"]
        for rule, row in rows.items():
            cells = [_cell(row[attack]) for attack in ATTACKS]
            lines.append(f"| {f'**{rule}**' if rule == RECOMMENDED else rule} | {' | '.join(cells)} |")
    lines += ["", "| claim | value | holds |", "|---|---|---|"]
    for claim in report["claims"]:
        lines.append(
            f"| {claim['text']} | {100 * claim['value']:.1f} points | {'yes' if claim['holds'] else '**no**'} |"
        )
    lines += ["", "The recipe of the first run:", "", "```toml", report["recipe"].rstrip(), "```", ""]
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    if not np.isfinite(values).all():
        return "no model"
    spread = f" ({100 * min(values):.1f} to {100 * max(values):.1f})" if len(values) > 1 else ""
    return f"{100 * np.mean(values):.1f}{spread}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--partial", type=Path, help="file to keep finished runs in, and to go on from")
    parser.add_argument("--report", type=Path, help="write PATH.md and PATH.json instead of the default")
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = run(options.seeds, options.partial)
    machine = {"x86_64": "x86", "AMD64": "x86"}.get(platform.machine(), platform.machine())
    hardware = f"{os.cpu_count()}core_{machine}"
    report: dict[str, Any] = {
        "command": f"OMP_NUM_THREADS=1 python benchmarks/federated_attacks.py --seeds {options.seeds}",
        "hardware": hardware,
        "seeds": options.seeds,
        "table": table,
        "claims": claims(table),
        "recommended": RECOMMENDED,
        "recipe": dump_toml(recipe("mean", "none", "IID", 0)),
        "versions": {
            "Python": platform.python_version(),
            **{name: version(name) for name in ("torch", "flwr", "numpy")},
        },
    }
    place = Path(__file__).parent / "reports" / f"federated_attacks_{hardware}_{datetime.date.today()}"
    path: Path = options.report or place
    path.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(render(report), encoding="utf-8")
    print(render(report))
    return 0 if all(claim["holds"] for claim in report["claims"]) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Claim: eight watches improve a pretrained model as well with compressed uplinks as with fp32, at 10x fewer bytes.

``python benchmarks/federated_watch.py`` pretrains on the ``early`` parts centrally, once per seed, then runs the recipe
``federated/recipes/watch_people.toml`` twice from each start: with its codec, and with ``Identity()`` (fp32 FedAvg, the
control). Nothing else differs. It writes a report and exits with 1 if a claim does not hold.

The noise that the claim is measured against: a start is trained by the control with three more seeds, which change
only the order of samples; their standard deviation is what luck alone does.
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

import numpy as np
import torch
from torch import nn

from efftrain.config import dump_toml, load_recipe
from efftrain.data import load_watch, standardize
from efftrain.federated import FederatedRecipe, FederatedResult, run_federated
from efftrain.federated.flower import VERSION
from efftrain.federated.recipe import UplinkConfig
from efftrain.models import build_model

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "federated" / "recipes" / "watch_people.toml"
PRETRAIN = {"epochs": 40, "batch_size": 32, "lr": 0.02, "momentum": 0.9}
LEAST_RATIO = 10.0
NOISE_SEEDS = 3


def pretrain(people: tuple[int, ...], part: str, seed: int) -> dict[str, torch.Tensor]:
    """What the server starts with: one process, plain SGD on the part that it has seen."""
    torch.manual_seed(seed)
    model = build_model("watch-cnn")
    data, _ = standardize(load_watch().select(people, part))
    optimizer = torch.optim.SGD(model.parameters(), lr=PRETRAIN["lr"], momentum=PRETRAIN["momentum"])
    rng, size = np.random.default_rng(seed), int(PRETRAIN["batch_size"])
    for _ in range(int(PRETRAIN["epochs"])):
        order = rng.permutation(len(data))
        for start in range(0, len(data), size):
            inputs, targets = data.batch(order[start : start + size])
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(torch.from_numpy(inputs)), torch.from_numpy(targets))
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return model.state_dict()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--report", type=Path, help="write PATH.md and PATH.json instead of the default")
    args = parser.parse_args()
    torch.set_num_threads(1)
    recipe = load_recipe(FederatedRecipe, RECIPE)
    runs: list[tuple[FederatedResult, FederatedResult]] = []
    starts = [pretrain(recipe.data.people, recipe.data.scale_part, seed) for seed in range(args.seeds)]
    for seed, start in enumerate(starts):
        mine = replace(recipe, seed=seed)
        control = run_federated(replace(mine, uplink=UplinkConfig(codec="Identity()")), initial=start)
        compressed = run_federated(mine, initial=start)
        runs.append((control, compressed))
        print(
            f"seed {seed}: before {compressed.accuracy_before:.4f}, control {control.accuracy:.4f}, "
            f"compressed {compressed.accuracy:.4f}, {_ratio(control, compressed):.1f}x fewer bytes, "
            f"{compressed.wall_s:.1f} s",
            file=sys.stderr,
        )
    plain = replace(recipe, uplink=UplinkConfig(codec="Identity()"))
    luck = [runs[0][0].accuracy] + [
        run_federated(replace(plain, seed=100 + extra), initial=starts[0]).accuracy for extra in range(NOISE_SEEDS)
    ]
    report = _report(recipe, runs, float(np.std(luck, ddof=1)))
    path = args.report or ROOT / "benchmarks" / "reports" / f"federated_watch_{_hardware()}_{datetime.date.today()}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(_markdown(report, recipe), encoding="utf-8")
    print(json.dumps(report["claims"]))
    return 0 if all(claim["holds"] for claim in report["claims"]) else 1


def _ratio(control: FederatedResult, compressed: FederatedResult) -> float:
    """Measured bytes of the control's replies over measured bytes of the compressed ones, all records counted."""
    return control.total("uplink_bytes") / compressed.total("uplink_bytes")


def _report(
    recipe: FederatedRecipe, runs: list[tuple[FederatedResult, FederatedResult]], noise: float
) -> dict[str, Any]:
    before = np.array([compressed.accuracy_before for _, compressed in runs])
    control = np.array([one.accuracy for one, _ in runs])
    compressed = np.array([two.accuracy for _, two in runs])
    gaps = compressed - control
    ratios = [_ratio(one, two) for one, two in runs]
    slowest = max(one.wall_s for pair in runs for one in pair)
    # The mean of n paired differences of two noisy runs has this standard error if nothing but luck differs.
    error = noise * np.sqrt(2 / len(runs))
    claims = [
        {
            "text": f"mean accuracy is at least the control's, within two standard errors of luck ({2 * error:.4f})",
            "value": float(gaps.mean()),
            "holds": bool(gaps.mean() >= -2 * error),
        },
        {
            "text": f"at least {LEAST_RATIO:g}x fewer uplink bytes than fp32 FedAvg, every seed",
            "value": min(ratios),
            "holds": min(ratios) >= LEAST_RATIO,
        },
        {
            "text": "better than the pretrained model, every seed",
            "value": float((compressed - before).min()),
            "holds": bool((compressed > before).all()),
        },
        {"text": "the rounds take at most 15 s on one core", "value": slowest, "holds": slowest <= 15},
    ]
    rounds = np.array([[two.accuracy_per_round for _, two in runs], [one.accuracy_per_round for one, _ in runs]])
    return {
        "command": "python benchmarks/federated_watch.py",
        "claims": claims,
        "noise_sd": noise,
        "accuracy_before": before.tolist(),
        "accuracy_control": control.tolist(),
        "accuracy_compressed": compressed.tolist(),
        "accuracy_per_round_compressed": rounds[0].mean(axis=0).tolist(),
        "accuracy_per_round_control": rounds[1].mean(axis=0).tolist(),
        "uplink_bytes_control": [one.total("uplink_bytes") for one, _ in runs],
        "uplink_bytes_compressed": [two.total("uplink_bytes") for _, two in runs],
        "uplink_ratio": ratios,
        "downlink_bytes": [two.total("downlink_bytes") for _, two in runs],
        "wall_s_control": [one.wall_s for one, _ in runs],
        "wall_s_compressed": [two.wall_s for _, two in runs],
        "final_sha256_compressed": [two.final_sha256 for _, two in runs],
        "seeds": len(runs),
        "pretraining": PRETRAIN,
        "recipe": dump_toml(recipe),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "flwr": VERSION},
        "numpy": np.__version__,
        "hardware": _hardware(),
    }


def _markdown(report: dict[str, Any], recipe: FederatedRecipe) -> str:
    def spread(name: str) -> str:
        values = np.array(report[name])
        return f"{values.mean():.4f} | {values.std(ddof=1):.4f} | {values.min():.4f} to {values.max():.4f}"

    people = len(recipe.data.people)
    lines = [
        "# Federated watches: compressed uplinks against fp32 FedAvg",
        "",
        f"`{report['command']}`, {report['hardware']}, one thread. Python {report['versions']['python']}, torch "
        f"{report['versions']['torch']}, flwr {report['versions']['flwr']}, numpy {report['numpy']}.",
        "",
        f"{people} people, one client each. Start: watch-cnn pretrained centrally on everybody's "
        f"`{recipe.data.scale_part}` part ({PRETRAIN['epochs']:g} epochs, lr {PRETRAIN['lr']}, momentum "
        f"{PRETRAIN['momentum']}, batch {PRETRAIN['batch_size']:g}). {recipe.server.rounds} rounds on the "
        f"`{recipe.data.train_part}` parts; accuracy on each person's own `{recipe.data.test_part}` part, mean over "
        f"people. {report['seeds']} seeds, each with its own start; compressed and control share start, seed and "
        "everything but the codec.",
        "",
        "| accuracy | mean | sd over seeds | range |",
        "|---|---|---|---|",
        f"| pretrained | {spread('accuracy_before')} |",
        f"| control, `Identity()` | {spread('accuracy_control')} |",
        f"| compressed, `{recipe.uplink.codec}` | {spread('accuracy_compressed')} |",
        "",
        f"Luck alone (one start, control, {NOISE_SEEDS + 1} shuffles): sd {report['noise_sd']:.4f}.",
        "",
        "| a run | control | compressed |",
        "|---|---|---|",
        f"| uplink bytes, all records of all replies | {np.mean(report['uplink_bytes_control']):,.0f} "
        f"| {np.mean(report['uplink_bytes_compressed']):,.0f} |",
        f"| downlink bytes, uncompressed | {np.mean(report['downlink_bytes']):,.0f} "
        f"| {np.mean(report['downlink_bytes']):,.0f} |",
        f"| seconds | {np.mean(report['wall_s_control']):.1f} | {np.mean(report['wall_s_compressed']):.1f} |",
        "",
        "| claim | value | holds |",
        "|---|---|---|",
        *(
            f"| {claim['text']} | {claim['value']:.4g} | {'yes' if claim['holds'] else '**no**'} |"
            for claim in report["claims"]
        ),
        "",
        "Mean accuracy after each round:",
        "",
        "| round | control | compressed |",
        "|---|---|---|",
    ]
    for number in sorted({1, 2, 5, 10, 15, 20, recipe.server.rounds}):
        if number <= recipe.server.rounds:
            control = report["accuracy_per_round_control"][number - 1]
            lines.append(f"| {number} | {control:.4f} | {report['accuracy_per_round_compressed'][number - 1]:.4f} |")
    lines += [
        "",
        "What a byte is: array data as it goes into the message (for the codec its header, parameters and places "
        "included), 8 a metric, and the names; replies to evaluation too. Flower's framing and the transport are not "
        "counted. The downlink counts the model twice a round, for training and for evaluation.",
        "",
        "The recipe:",
        "",
        "```toml",
        report["recipe"].rstrip(),
        "```",
        "",
    ]
    return "\n".join(lines)


def _hardware() -> str:
    machine = {"x86_64": "x86", "AMD64": "x86"}.get(platform.machine(), platform.machine())
    return f"{os.cpu_count()}core_{machine}"


if __name__ == "__main__":
    sys.exit(main())

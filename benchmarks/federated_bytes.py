"""Claim: uplinks through a codec reach the accuracy of fp32 FedAvg, within a point, with 30x fewer uplink bytes.

``python benchmarks/federated_bytes.py`` runs 50 clients with 300 Fashion-MNIST images each, all of them in every round,
once with IID and once with Dirichlet 0.3 data: FedAvg with fp32 uplinks, the same with the largest 3 % of each update
in 8 bits and error feedback, and that with models sent to the clients in 8 bits as well. The target is the accuracy
that fp32 FedAvg has after its last round, less one point; what counts is the bytes of all replies (payloads, names,
metrics) up to the first round that reaches it. It writes a report, and exits with 1 if a claim does not hold.
"""

import argparse
import datetime
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any, Literal

import torch

from efftrain.config import to_dict
from efftrain.federated import FederatedRecipe, FederatedResult, RoundResult, run_federated
from efftrain.federated.flower import VERSION
from efftrain.federated.recipe import (
    ClientConfig,
    DataConfig,
    DownlinkConfig,
    FleetConfig,
    ModelConfig,
    RoundsConfig,
    UplinkConfig,
)

ROOT = Path(__file__).parent.parent
CODEC = "TopK(0.03) >> Int8(block=64)"
DOWNLINK = "Int8(block=64)"
POINT = 0.01
LEAST_RATIO = 30.0


def recipe(
    split: Literal["iid", "dirichlet"], codec: str, rounds: int, seed: int, downlink: str = "Identity()"
) -> FederatedRecipe:
    return FederatedRecipe(
        name="bytes",
        seed=seed,
        model=ModelConfig(name="fashion-cnn"),
        data=DataConfig(name="fashion-mnist", partition=split, alpha=0.3, clients=50, samples_per_client=300),
        client=ClientConfig(engine="device", epochs=1, batch_size=10, lr=0.05),
        server=RoundsConfig(rounds=rounds, evaluate="server"),
        uplink=UplinkConfig(codec=codec),
        downlink=DownlinkConfig(codec=downlink),
        fleet=FleetConfig(workers=2),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=25, help="of fp32 FedAvg; the compressed run has twice as many")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--report", type=Path, help="write PATH.md and PATH.json instead of the default")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    splits: tuple[Literal["iid", "dirichlet"], ...] = ("iid", "dirichlet")
    for split in splits:
        for seed in range(args.seeds):
            plain = run(recipe(split, "Identity()", args.rounds, seed))
            target = plain.accuracy - POINT
            ours = run(recipe(split, CODEC, 2 * args.rounds, seed))
            both = run(recipe(split, CODEC, 2 * args.rounds, seed, DOWNLINK))
            rows.append(row(split, seed, target, plain, ours, both))
            print(json.dumps(rows[-1]), file=sys.stderr)
    claims = [
        {
            "claim": f"uplink bytes to the target, {one['split']}, seed {one['seed']}",
            "measured": one["ratio"],
            "at_least": LEAST_RATIO,
            "holds": one["ratio"] is not None and one["ratio"] >= LEAST_RATIO,
        }
        for one in rows
    ] + [
        {
            "claim": f"rounds to the target with an 8-bit downlink too, {one['split']}, seed {one['seed']}",
            "measured": one["both_rounds"],
            "at_most": 2 * args.rounds,
            "holds": one["both_rounds"] is not None,
        }
        for one in rows
    ]
    report = {
        "date": str(datetime.date.today()),
        "command": f"python benchmarks/federated_bytes.py --rounds {args.rounds} --seeds {args.seeds}",
        "recipe": to_dict(recipe("iid", CODEC, 2 * args.rounds, 0)),
        "rows": rows,
        "claims": claims,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "flwr": VERSION},
    }
    path = args.report or ROOT / "benchmarks" / "reports" / f"federated_bytes_{_hardware()}_{datetime.date.today()}"
    path.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown(report), encoding="utf-8")
    print(json.dumps(claims))
    return 0 if all(claim["holds"] for claim in claims) else 1


def run(settings: FederatedRecipe) -> FederatedResult:
    def show(one: RoundResult) -> None:
        if one.round % 5 == 0:
            codec = settings.uplink.codec
            print(f"{settings.data.partition} {codec} round {one.round}: {one.accuracy:.4f}", file=sys.stderr)

    return run_federated(settings, on_round=show)


def row(
    split: str, seed: int, target: float, plain: FederatedResult, ours: FederatedResult, both: FederatedResult
) -> dict[str, Any]:
    rounds_plain, bytes_plain = until(plain, target)
    rounds_ours, bytes_ours = until(ours, target)
    rounds_both, _ = until(both, target)
    found = bytes_ours is not None and bytes_plain is not None
    return {
        "split": split,
        "seed": seed,
        "target": target,
        "fp32_accuracy": plain.accuracy,
        "accuracy": ours.accuracy,
        "fp32_rounds": rounds_plain,
        "rounds": rounds_ours,
        "fp32_bytes": bytes_plain,
        "bytes": bytes_ours,
        "ratio": bytes_plain / bytes_ours if found else None,  # type: ignore[operator]
        "both_accuracy": both.accuracy,
        "both_rounds": rounds_both,
        "downlink_ratio_a_round": plain.rounds[0].downlink_bytes / both.rounds[0].downlink_bytes,
        "both_accuracy_per_round": both.accuracy_per_round,
        "ratio_a_round": plain.rounds[0].uplink_bytes / ours.rounds[0].uplink_bytes,
        "accuracy_per_round": ours.accuracy_per_round,
        "fp32_accuracy_per_round": plain.accuracy_per_round,
    }


def until(result: FederatedResult, target: float) -> tuple[int | None, int | None]:
    """Round that first reaches the target, and bytes sent by then."""
    sent = 0
    for one in result.rounds:
        sent += one.uplink_bytes
        if one.accuracy >= target:
            return one.round, sent
    return None, None


def markdown(report: dict[str, Any]) -> str:
    lines = [
        "# Uplink bytes to the accuracy of fp32 FedAvg",
        "",
        f"`{report['command']}`, {report['date']}. Codec `{CODEC}` with error feedback; 50 clients, 300 images each, "
        "all in every round. Target: the last accuracy of fp32 FedAvg less one point. Bytes are those of all replies, "
        f"counted after encoding. Both ways: models are sent to the clients with `{DOWNLINK}`, "
        f"{report['rows'][0]['downlink_ratio_a_round']:.1f}x fewer bytes a round (recipe and names included).",
        "",
        "| split | seed | fp32 accuracy | target | rounds fp32 / ours / both ways | MB fp32 / ours | ratio | "
        "ours at the end | both ways |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in report["rows"]:
        sent = "-" if one["bytes"] is None else f"{one['bytes'] / 1e6:.2f}"
        ratio = "not reached" if one["ratio"] is None else f"{one['ratio']:.1f}x"
        lines.append(
            f"| {one['split']} | {one['seed']} | {one['fp32_accuracy']:.4f} | {one['target']:.4f} | "
            f"{one['fp32_rounds']} / {one['rounds']} / {one['both_rounds']} | "
            f"{one['fp32_bytes'] / 1e6:.1f} / {sent} | {ratio} | "
            f"{one['accuracy']:.4f} | {one['both_accuracy']:.4f} |"
        )
    lines += ["", "Versions: " + ", ".join(f"{name} {version}" for name, version in report["versions"].items()) + "."]
    return "\n".join(lines) + "\n"


def _hardware() -> str:
    return f"{os.cpu_count()}core_{'x86' if platform.machine() == 'x86_64' else platform.machine()}"


if __name__ == "__main__":
    sys.exit(main())

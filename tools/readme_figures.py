"""Writes the table of measured results into README.md, from the newest report of each benchmark.

    python tools/readme_figures.py           # rewrite the table
    python tools/readme_figures.py --check   # exit 1 if README.md differs from the reports

A number in the README that no report has is a mistake; a test runs the check.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).parent.parent
REPORTS = ROOT / "benchmarks" / "reports"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


def newest(theme: str) -> tuple[dict[str, Any], str]:
    """The newest report of a theme, and its Markdown beside it as a link target."""
    path = sorted(REPORTS.glob(f"{theme}_*.json"), key=lambda p: p.stem[-10:])[-1]
    return json.loads(path.read_text(encoding="utf-8")), path.with_suffix(".md").relative_to(ROOT).as_posix()


def table() -> str:
    """The table, as Markdown."""
    cluster, cluster_link = newest("cluster_watch")
    federated, federated_link = newest("federated_watch")
    link, link_link = newest("limited_link_2nodes_100mbit")
    speed, speed_link = newest("federated_speed")
    device, device_link = newest("device_watch")
    fashion, fashion_link = newest("device_fashion_mcunet-5fps")
    mcunet, mcunet_link = newest("device_mcunet")
    published, reference = mcunet["mcunet"]["rows"][0], mcunet["mcunet"]["reference"]
    small = next(row for row in mcunet["mcunet"]["rows"] if row["tiled"])
    plain, packed = cluster["modes"]["uncompressed"], cluster["modes"]["compressed"]
    modes, crowd = link["modes"], speed["round_of_10000_clients"]
    topk = modes["TopK 1 %, Int8 values"]
    loops_s = 10_000 / 100 * speed["ways"]["plain loop"]["wall_s"] / 2
    sparse, full = device["accuracy"]["sparse"]["integer"], device["accuracy"]["full"]["integer"]
    rows = [
        (
            f"Cluster: gradients, 2 workers, {len(plain['accuracy'])} seeds",
            f"{percent(mean(packed['accuracy']))} accuracy, {packed['ratio']:.1f}x fewer bytes",
            f"uncompressed {percent(mean(plain['accuracy']))}",
            cluster_link,
        ),
        (
            "Cluster: a step of 10 million parameters, 2 nodes, 100 Mbit/s",
            f"top-k 1 % {ms(topk)}, {topk['wire_bytes'] / 1e6:.2f} MB sent; Int8 {ms(modes['Int8, two phases'])}",
            f"fp32 {ms(modes['fp32'])}, Horovod fp16 {ms(modes['Horovod fp16'])}, alone {ms(modes['no exchange'])}",
            link_link,
        ),
        (
            f"Federated: uplinks of 8 watches, {federated['seeds']} seeds",
            f"{percent(mean(federated['accuracy_compressed']))} accuracy, "
            f"{mean(federated['uplink_ratio']):.1f}x fewer bytes",
            f"fp32 FedAvg {percent(mean(federated['accuracy_control']))}, "
            f"before {percent(mean(federated['accuracy_before']))}",
            federated_link,
        ),
        (
            "Federated: 10,000 devices train in one round, 2 cores",
            f"{crowd['train_s']:.1f} s, {crowd['peak_rss_bytes'] / 1e9:.2f} GB",
            f"two plain PyTorch loops {loops_s:.1f} s",
            speed_link,
        ),
        (
            f"Device: sparse update in integers, {len(device['people'])} people x {device['seeds']} seeds",
            f"{sparse['mean']:.1f} % accuracy in {ram(device, 'sparse')} B of RAM",
            f"untouched {device['accuracy']['none']['integer']['mean']:.1f} %, "
            f"fp32 {device['accuracy']['sparse']['fp32']['mean']:.1f} %",
            device_link,
        ),
        (
            "Device: full update in integers",
            f"{full['mean']:.1f} % accuracy in {ram(device, 'full')} B of RAM",
            f"fp32 {device['accuracy']['full']['fp32']['mean']:.1f} %",
            device_link,
        ),
        (
            f"Device: MCUNet-5fps at 64x64 learns shifted Fashion-MNIST in integers, {fashion['seeds']} seeds",
            f"49kb scheme {learned(fashion, 'mcunetv3-49kb')}",
            f"last 6 layers {learned(fashion, 'last_k=6')}, untouched {mean(tests(fashion, 'none')):.1f} %",
            fashion_link,
        ),
        (
            "Device: MCUNet-5fps at 128x128, the published 49kb scheme, emulated Cortex-M7",
            f"trains in {published['total_ram_bytes']:,} B of RAM, "
            f"{published['instructions_per_step'] / 1e6:.1f} M instructions a step",
            f"reference system {reference['total_ram_bytes']:,} B, "
            f"{reference['instructions_per_step'] / 1e6:.1f} M instructions",
            mcunet_link,
        ),
        (
            f"The same on a board of {small['enforced_ram_bytes'] // 1024} KiB, samples read in place",
            f"{small['total_ram_bytes']:,} B, {small['instructions_per_step'] / 1e6:.1f} M instructions, equal bits",
            "-",
            mcunet_link,
        ),
    ]
    lines = ["| what | measured | control | report |", "|---|---|---|---|"]
    lines += [f"| {what} | {measured} | {control} | [report]({link}) |" for what, measured, control, link in rows]
    return "\n".join(lines)


def ram(device: dict[str, Any], scheme: str) -> str:
    """Whole RAM of a scheme with stack, planned, in bytes."""
    plan = device["back_ends"][scheme]["plan"]
    parts = ("arena_bytes", "trained_state_bytes", "scratch_bytes", "stack_bytes", "static_bytes")
    return f"{sum(plan[part] for part in parts):,}"


def tests(fashion: dict[str, Any], scheme: str) -> list[float]:
    """Accuracy with QAS of each seed, in percent."""
    found: list[float] = fashion["schemes"][scheme]["qas"]["test"]
    return found


def learned(fashion: dict[str, Any], scheme: str) -> str:
    """Accuracy and whole RAM."""
    return f"{mean(tests(fashion, scheme)):.1f} % in {fashion['schemes'][scheme]['total_ram_bytes']:,} B"


def ms(mode: dict[str, Any]) -> str:
    """Of a step."""
    return f"{1000 * mode['step_s']:.0f} ms" if "step_s" in mode else "not run"


def percent(share: float) -> str:
    """One decimal."""
    return f"{100 * share:.1f} %"


def main() -> int:
    """Rewrite or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    path = ROOT / "README.md"
    old = path.read_text(encoding="utf-8")
    before, _, rest = old.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        print(f"README.md has no lines {BEGIN} and {END}", file=sys.stderr)
        return 1
    new = f"{before}{BEGIN}\n{table()}\n{END}{after}"
    if args.check:
        if new != old:
            print("README.md differs from the reports; run: python tools/readme_figures.py", file=sys.stderr)
        return int(new != old)
    path.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

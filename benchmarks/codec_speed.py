"""Time of every codec in units of a copy of the same tensor, one thread, and the bytes it writes.

Copy and codec alternate, so that a busy moment of the machine meets both; medians are compared. ``feedback`` is a step
of ``Feedback``: add the residual, encode, keep what is left.

    OMP_NUM_THREADS=1 python benchmarks/codec_speed.py --elements 10000000 --repeats 9
"""

import argparse
import datetime
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from efftrain.compression import Feedback, format_codec, kernels, parse_codec
from efftrain.report.run import environment

HERE = Path(__file__).parent
CODECS = (
    "Identity",
    "Half('fp16')",
    "Half('bf16')",
    "Int8",
    "IntN(4)",
    "IntN(2)",
    "Fp8('e4m3')",
    "Mx('e4m3')",
    "Mx('e3m2')",
    "Mx('e2m1')",
    "Mx('int8')",
    "Ternary",
    "Sign",
    "TopK(0.01)",
    "TopK(0.01) >> Int8(block=64)",
    "TopK(0.01) >> IntN(4)",
    "TopK(0.001) >> Int8(block=64)",
    "RandomK(0.01)",
    "Threshold(0.01)",
    "LowRank(2)",
    "LowRank(8)",
)


def measure(work: dict[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, float]]:
    """Median, fastest and slowest of each piece of work in ms; the pieces take turns."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(repeats + 1):
        for name, run in work.items():
            started = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - started))
    # The first turn pays for fresh memory and builds the kernels.
    return {name: {"ms": median(t[1:]), "fastest": min(t[1:]), "slowest": max(t[1:])} for name, t in times.items()}


def measure_codec(text: str, gradient: Any, repeats: int) -> dict[str, Any]:
    """All directions of one codec."""
    codec = parse_codec(text)
    feedback = Feedback(codec)
    payload = codec.encode(gradient)
    copy_to, out = np.zeros_like(gradient), np.zeros_like(gradient)
    step = 0

    def feed() -> None:
        nonlocal step
        step += 1
        feedback.encode("w", gradient, key=step)
        feedback.commit()

    feed()  # the second step is the first that has a residual
    feed()
    result: dict[str, Any] = measure(
        {
            "copy": lambda: np.copyto(copy_to, gradient),
            "encode": lambda: codec.encode(gradient),
            "decode": lambda: codec.decode(payload),
            "decode_add": lambda: codec.decode_add(payload, out),
            "feedback": feed,
        },
        repeats,
    )
    for name in ("encode", "decode", "decode_add", "feedback"):
        result[name]["copies"] = result[name]["ms"] / result["copy"]["ms"]
    result["codec"] = format_codec(codec)
    result["bytes_per_element"] = payload.num_bytes / gradient.size
    return result


def measure_torch(gradient: Any, repeats: int) -> dict[str, Any]:
    """The same selection by ``torch.topk``, as it is usually written."""
    g, residual = torch.from_numpy(gradient), torch.zeros(gradient.size)
    copy_to = torch.zeros(gradient.size)

    def select() -> None:
        owed = g + residual
        places = torch.topk(owed.abs(), round(0.01 * owed.numel()), sorted=False).indices
        owed[places] = 0
        residual.copy_(owed)

    result: dict[str, Any] = measure({"copy": lambda: copy_to.copy_(g), "feedback": select}, repeats)
    result["feedback"]["copies"] = result["feedback"]["ms"] / result["copy"]["ms"]
    return result


def render(report: dict[str, Any], command: str) -> str:
    """The Markdown report."""
    rows = [
        f"| `{r['codec']}` | {r['bytes_per_element']:.4f} | {r['copy']['ms']:.2f} | "
        + " | ".join(f"{r[name]['copies']:.2f}" for name in ("encode", "decode", "decode_add", "feedback"))
        + f" | {r['feedback']['ms']:.1f} ({r['feedback']['fastest']:.1f} to {r['feedback']['slowest']:.1f}) |"
        for r in report["codecs"]
    ]
    numpy_rows = [
        f"| `{r['codec']}` | "
        + " | ".join(f"{r[n]['copies']:.2f}" for n in ("encode", "decode", "decode_add", "feedback"))
        for r in report["numpy"]
    ]
    lines = [
        "# Time of codecs in copies of the same tensor",
        "",
        f"`{command}`",
        "",
        f"{report['elements']:,} float32 of a normal distribution, seed 0, one thread, median of {report['repeats']} "
        "after one warm-up turn; copy and codec take turns. Bytes are after encoding, header included. All times but "
        "those in ms are multiples of the copy. The last column is a step of `Feedback`, its fastest and slowest turn.",
        "",
        f"Kernels: {report['kernels']}.",
        "",
        "| codec | bytes an element | copy, ms | encode | decode | decode and add | feedback | feedback, ms |",
        "|---|---|---|---|---|---|---|---|",
        *rows,
        "",
        "Without compiled kernels (`EFFTRAIN_KERNELS=off`):",
        "",
        "| codec | encode | decode | decode and add | feedback |",
        "|---|---|---|---|---|",
        *(row + " |" for row in numpy_rows),
        "",
        f"Select 1 % and keep the rest with `torch.topk`: {report['torch_topk']['feedback']['copies']:.1f} copies, "
        f"{report['torch_topk']['feedback']['ms']:.0f} ms.",
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
    """Measure, write the report; 1 if a claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=10_000_000)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--hardware", default=f"{os.cpu_count()}core_{platform.machine().replace('x86_64', 'x86')}")
    parser.add_argument("--date", default=datetime.date.today().isoformat())
    parser.add_argument("--out", type=Path, default=HERE / "reports")
    args = parser.parse_args()
    torch.set_num_threads(1)
    gradient = np.random.default_rng(0).standard_normal(args.elements, np.float32)
    compiled = kernels.available()
    codecs = []
    for text in CODECS:
        codecs.append(measure_codec(text, gradient, args.repeats))
        print(text, {n: round(codecs[-1][n]["copies"], 2) for n in ("encode", "decode", "feedback")}, file=sys.stderr)
    os.environ["EFFTRAIN_KERNELS"] = "off"
    without = [measure_codec(text, gradient, 3) for text in ("Int8", "TopK(0.01)")]
    by_text = dict(zip(CODECS, codecs, strict=True))
    report = {
        "elements": args.elements,
        "repeats": args.repeats,
        "kernels": f"compiled with `{compiled.split('(')[-1].rstrip(')').split('/')[-1]}`" if compiled else "none",
        "codecs": codecs,
        "numpy": without,
        "torch_topk": measure_torch(gradient, 3),
        "claims": {
            "TopK 1 %: select, encode and residual within 4 copies": by_text["TopK(0.01)"]["feedback"]["copies"] <= 4,
            "Int8: encode within 3 copies": by_text["Int8"]["encode"]["copies"] <= 3,
        },
        "environment": environment(),
    }
    path = args.out / f"codec_speed_{args.hardware}_{args.date}"
    command = f"OMP_NUM_THREADS=1 python benchmarks/codec_speed.py --elements {args.elements} --repeats {args.repeats}"
    path.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(render(report, command), encoding="utf-8")
    print(path.with_suffix(".md"))
    return 0 if all(report["claims"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())

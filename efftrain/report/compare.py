"""Run folders side by side: one table, one plot of accuracy a step and one a byte."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from efftrain.errors import DataError
from efftrain.report.figures import Figure, Series, line_plot
from efftrain.report.page import Page, Section, Table
from efftrain.report.run import read_metrics
from efftrain.units import format_bytes, format_seconds

_EXCHANGE = ("wire_bytes", "uncompressed_bytes", "node_bytes", "encode_s", "exchange_s", "decode_s")
"""Figures of the gradient exchange; a run without one has none of them."""


@dataclass(frozen=True)
class Run:
    """A run folder, read."""

    path: Path
    result: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]

    @property
    def label(self) -> str:
        """The folder's name."""
        return self.path.resolve().name

    def rows(self, kind: str) -> list[Mapping[str, Any]]:
        """The lines of ``metrics.jsonl`` of one kind."""
        return [row for row in self.metrics if row.get("kind") == kind]


def read_run(path: Path) -> Run:
    """Read a run folder that has finished.

    Raises:
        DataError: No such folder, no ``result.json``, or a damaged file; or it is the result of another kind of run.
    """
    try:
        result = json.loads((path / "result.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        state = "has not finished" if path.is_dir() else "does not exist"
        raise DataError(f"run {path} {state}: there is no result.json in it") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path / 'result.json'} cannot be read as JSON: {error}") from error
    if not isinstance(result, dict):
        raise DataError(f"{path / 'result.json'} holds a {type(result).__name__}, expected a JSON object")
    for name in ("accuracy", "loss", "num_steps", "train_s", *_EXCHANGE):
        _expect_number(result, name, path / "result.json")
    metrics = read_metrics(path / "metrics.jsonl")
    for row in metrics:
        for name in ("step", "accuracy", "loss", "step_s", "residual_norm", *_EXCHANGE):
            _expect_number(row, name, path / "metrics.jsonl")
    return Run(path, result, metrics)


def comparison_table(runs: Sequence[Run]) -> Table:
    """The figures of each run that people compare."""
    rows = []
    for run in runs:
        result = run.result
        sent, plain = result.get("wire_bytes"), result.get("uncompressed_bytes")
        rows.append(
            (
                run.label,
                _text(result.get("codec")),
                _processes(result),
                _share(result.get("accuracy")),
                _number(result.get("loss")),
                format_bytes(sent) if sent else "none",
                f"{plain / sent:.1f}x" if sent and plain else "-",
                format_seconds(result["train_s"]) if result.get("train_s") is not None else "-",
            )
        )
    columns = ("run", "codec", "processes", "accuracy", "loss", "sent by a rank", "compression", "training time")
    return Table(columns, rows, num_text_columns=2)


def _processes(result: Mapping[str, Any]) -> str:
    """``8: 2 data x 2 tensor x 2 pipeline``; the number alone if the data axis is the only one."""
    number, axes = _text(result.get("world_size")), result.get("axes")
    if not isinstance(axes, Mapping):
        return number
    sizes = " x ".join(f"{axes[name]} {name}" for name in ("data", "tensor", "pipeline") if axes.get(name, 1) != 1)
    sharded = "" if axes.get("shard", "none") == "none" else ", sharded"
    return number + (f": {sizes}" if axes.get("tensor", 1) != 1 or axes.get("pipeline", 1) != 1 else "") + sharded


def comparison_page(runs: Sequence[Run]) -> Page:
    """The report of one or more cluster runs.

    Raises:
        DataError: No run has evaluations to plot.
    """
    evaluated = [run for run in runs if run.rows("eval")]
    if not evaluated:
        names = ", ".join(str(run.path) for run in runs)
        raise DataError(f"no evaluations to plot in {names}; expected lines of kind 'eval' in metrics.jsonl")
    names = " against ".join(run.label for run in runs)
    best = max(runs, key=lambda run: float(run.result.get("accuracy") or 0))
    lead = f"Best accuracy {_share(best.result.get('accuracy'))} by {best.label}."
    sections = [Section("Figures", "", [comparison_table(runs)], learning_figures(evaluated))]
    exchanging = [run for run in runs if run.result.get("wire_bytes")]
    if exchanging:
        sections.append(
            Section("Gradient exchange", "Data axis.", [exchange_table(exchanging)], exchange_figures(exchanging))
        )
    return Page(f"efftrain report: {names}", lead, sections, facts(best.result))


def exchange_table(runs: Sequence[Run]) -> Table:
    """What a step of each run sends, and what the exchange costs it, as means over the run on rank 0."""
    rows = []
    for run in runs:
        num_steps = max(1, int(run.result.get("num_steps") or 1))
        mean = {name: float(run.result.get(name) or 0) / num_steps for name in _EXCHANGE}
        steps = [float(row["step_s"]) for row in run.rows("step") if row.get("step_s")]
        rows.append(
            (
                run.label,
                format_bytes(mean["uncompressed_bytes"]),
                format_bytes(mean["wire_bytes"]),
                format_bytes(mean["node_bytes"]) if mean["node_bytes"] else "-",
                *(f"{1000 * mean[name]:.2f} ms" for name in ("encode_s", "exchange_s", "decode_s")),
                f"{1000 * median(steps):.2f} ms" if steps else "-",
            )
        )
    columns = ("run", "fp32 a step", "sent a step", "inside nodes", "encode", "wait for others", "decode", "whole step")
    return Table(columns, rows, num_text_columns=1)


def exchange_figures(runs: Sequence[Run]) -> list[Figure]:
    """Bytes of each step, and what is still owed after it."""
    sent = [series for run in runs if (series := _series(run, "step", "step", "wire_bytes")).x]
    owed = [series for run in runs if any((series := _series(run, "step", "step", "residual_norm")).y)]
    figures = []
    if sent:
        caption = "Bytes that rank 0 sends in a step, encoded."
        figures.append(line_plot("sent", sent, x_label="updates", y_label="bytes a step", caption=caption))
    if owed:
        caption = "Euclidean norm of what error feedback keeps on rank 0 for later steps."
        figures.append(line_plot("owed", owed, x_label="updates", y_label="norm of the residuals", caption=caption))
    return figures


def learning_figures(runs: Sequence[Run], prefix: str = "") -> list[Figure]:
    """Loss a step, accuracy a step and, if anything was sent, accuracy a byte on the wire."""
    losses = [_series(run, "step", "step", "loss") for run in runs]
    accuracy = [_series(run, "eval", "step", "accuracy") for run in runs]
    figures = [
        line_plot(
            f"{prefix}loss",
            losses,
            x_label="updates",
            y_label="training loss (nats)",
            caption="Training loss, mean over the ranks.",
        ),
        line_plot(
            f"{prefix}accuracy",
            accuracy,
            x_label="updates",
            y_label="accuracy (%)",
            caption="Accuracy on the test data.",
            percent=True,
        ),
    ]
    if any(row.get("wire_bytes") for run in runs for row in run.rows("eval")):
        traffic = [series for run in runs if (series := _series(run, "eval", "wire_bytes", "accuracy")).x]
        figures.append(
            line_plot(
                f"{prefix}traffic",
                traffic,
                x_label="bytes sent by each rank",
                y_label="accuracy (%)",
                caption="The same accuracy against the bytes that a rank had sent by then.",
                log_x=True,
                percent=True,
            )
        )
    return figures


def facts(result: Mapping[str, Any]) -> dict[str, str]:
    """Versions, hardware and seed of a result, for the foot of a page."""
    environment = result.get("environment")
    environment = environment if isinstance(environment, Mapping) else {}
    versions = environment.get("versions")
    versions = versions if isinstance(versions, Mapping) else {}
    return {
        "seed": _text(result.get("seed")),
        "hardware": f"{environment.get('cpu', '?')}, {environment.get('num_cpus', '?')} CPUs",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }


def _expect_number(values: Mapping[str, Any], name: str, file: Path) -> None:
    value = values.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise DataError(f"{file}: {name} is {value!r}, expected a number or null; the file is damaged")


def _series(run: Run, kind: str, x: str, y: str) -> Series:
    rows = [row for row in run.rows(kind) if row.get(x) is not None and row.get(y) is not None]
    return Series(run.label, [row[x] for row in rows], [row[y] for row in rows])


def _text(value: Any) -> str:
    return "-" if value is None else str(value)


def _share(value: Any) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.3f}"

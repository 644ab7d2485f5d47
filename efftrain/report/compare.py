"""Run folders side by side: one table, one plot of accuracy a step and one a byte."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from efftrain.errors import DataError
from efftrain.report.figures import Figure, Series, line_plot
from efftrain.report.page import Page, Section, Table
from efftrain.report.run import read_metrics
from efftrain.units import format_bytes, format_seconds


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
    for name in ("accuracy", "loss", "wire_bytes", "uncompressed_bytes", "train_s"):
        _expect_number(result, name, path / "result.json")
    metrics = read_metrics(path / "metrics.jsonl")
    for row in metrics:
        for name in ("step", "accuracy", "loss", "wire_bytes"):
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
                _text(result.get("world_size")),
                _share(result.get("accuracy")),
                _number(result.get("loss")),
                format_bytes(sent) if sent else "none",
                f"{plain / sent:.1f}x" if sent and plain else "-",
                format_seconds(result["train_s"]) if result.get("train_s") is not None else "-",
            )
        )
    columns = ("run", "codec", "processes", "accuracy", "loss", "sent by a rank", "compression", "training time")
    return Table(columns, rows, num_text_columns=2)


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
    section = Section("Figures", "", [comparison_table(runs)], learning_figures(evaluated))
    return Page(f"efftrain report: {names}", lead, [section], facts(best.result))


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

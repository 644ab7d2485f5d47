"""The run folder: what every run leaves behind.

``runs/<name>/`` holds ``recipe.toml`` (resolved), ``metrics.jsonl`` (one JSON object a line, with a ``kind``),
``checkpoints/``, ``result.json`` (figures, versions, seed, hardware) and ``report.html``.
"""

import json
import math
import os
import platform
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

import efftrain
from efftrain.config import dump_toml
from efftrain.errors import ConfigError, DataError, ToolError


class RunFolder:
    """Writes one run. Only the process that owns the run (rank 0) makes one.

    Args:
        path: The folder; made if it is not there.
        tensorboard: Also write every number as a tensorboard scalar (extra ``tensorboard``).
    """

    def __init__(self, path: Path, *, tensorboard: bool = False) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._metrics = (path / "metrics.jsonl").open("a", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"run folder {path} cannot be written ({error.strerror}); choose another one") from error
        self._board = _tensorboard(path) if tensorboard else None

    def write_recipe(self, recipe: Any) -> None:
        """Save the resolved recipe, a config dataclass, as ``recipe.toml``."""
        write_atomic(self.path / "recipe.toml", dump_toml(recipe))

    def log(self, kind: str, **row: Any) -> None:
        """Append one line to ``metrics.jsonl`` and flush it. inf and NaN become ``null``: JSON has neither."""
        self._metrics.write(json.dumps({"kind": kind, **clean(row)}) + "\n")
        self._metrics.flush()
        if self._board is not None and "step" in row:
            for name, value in row.items():
                if isinstance(value, (int, float)) and name != "step":
                    self._board.add_scalar(f"{kind}/{name}", value, row["step"])

    def rewind(self, step: int) -> None:
        """Drop every line of a later ``step``: a run that resumes from ``step`` writes them again."""
        self._metrics.close()
        path = self.path / "metrics.jsonl"
        kept = [row for row in read_metrics(path, partial=True) if row.get("step", 0) <= step]
        write_atomic(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._metrics = path.open("a", encoding="utf-8")

    def finish(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """Write ``result.json``: the figures given, and what made them. Returns the whole of it."""
        whole = {**clean(dict(result)), "environment": environment()}
        write_atomic(self.path / "result.json", json.dumps(whole, indent=2) + "\n")
        return whole

    def close(self) -> None:
        """Close the files. A second call does nothing."""
        self._metrics.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def next_run_number(root: Path, name: str) -> int:
    """Number of the next run called ``name``: 1 if there is none, else one more than the highest."""
    return max(_numbers(root, name), default=0) + 1


def claim_run(root: Path, name: str) -> int:
    """Make the folder of the next run called ``name``, which no other process gets too, and return its number.

    Raises:
        ConfigError: ``name`` is no plain file name, or the folder cannot be made.
    """
    while True:
        number = next_run_number(root, name)
        path = run_path(root, name, number)
        try:
            if not root.is_dir():
                root.mkdir(parents=True, exist_ok=True)
            path.mkdir()
            return number
        except FileExistsError:
            if not root.is_dir():
                raise ConfigError(f"{root} is a file, expected a folder for the run folders") from None
        except OSError as error:
            raise ConfigError(f"run folder {path} cannot be made ({error.strerror}); choose another one") from error


def run_path(root: Path, name: str, number: int) -> Path:
    """``root/name`` for the first run, ``root/name-2`` for the second."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ConfigError(f"run name {name!r} is no plain file name; use letters, digits, '.', '_' and '-'")
    return root / (name if number == 1 else f"{name}-{number}")


def read_metrics(path: Path, *, partial: bool = False) -> list[dict[str, Any]]:
    """All rows of a ``metrics.jsonl``.

    Args:
        path: The file.
        partial: Ignore a last line that was cut off by a crash.

    Raises:
        DataError: A line is not a JSON object.
    """
    rows = []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            if partial and number == len(lines):
                break
            raise DataError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number} is a {type(row).__name__}, expected a JSON object")
        rows.append(row)
    return rows


def environment() -> dict[str, Any]:
    """Versions and hardware, for ``result.json``."""
    versions = {"efftrain": efftrain.__version__, "python": platform.python_version()}
    for package in ("torch", "numpy", "flwr", "unicorn", "ziglang"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "machine": platform.machine(),
        "system": platform.system(),
        "num_cpus": os.cpu_count(),
        "cpu": _cpu_model(),
    }


def write_atomic(path: Path, text: str) -> None:
    """Write a whole text file or nothing: the old content stays until the new one is on the disk."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def clean(value: Any) -> Any:
    """``value`` with inf and NaN replaced by ``None``, tuples by lists: strict JSON."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): clean(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(v) for v in value]
    return value


def _numbers(root: Path, name: str) -> list[int]:
    pattern = re.compile(re.escape(name) + r"(?:-(\d+))?")
    found = (pattern.fullmatch(path.name) for path in root.iterdir()) if root.is_dir() else iter(())
    return [int(match[1] or 1) for match in found if match]


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def check_tensorboard() -> None:
    """Find out whether a ``RunFolder`` could write tensorboard files, before one is made.

    Raises:
        ToolError: tensorboard is not installed.
    """
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise ToolError("tensorboard is not installed; run: pip install 'efftrain[tensorboard]'") from error


def _tensorboard(path: Path) -> Any:
    check_tensorboard()
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(path / "tensorboard"))

"""Which run a launch began: its workers go on with that one after a restart, whatever else is in the folder."""

from pathlib import Path

from efftrain.report.run import next_run_number, run_path, write_atomic

FILE = "launch_id"


def find_run(root: Path, name: str, launch: str | None) -> int | None:
    """Number of the run called ``name`` that this launch began; ``None`` if it has not come that far."""
    if launch is None:
        return None
    for number in range(next_run_number(root, name) - 1, 0, -1):
        path = run_path(root, name, number) / FILE
        if path.exists() and path.read_text(encoding="utf-8") == launch:
            return number
    return None


def mark_run(root: Path, name: str, number: int, launch: str | None) -> None:
    """Make the run findable by ``find_run``."""
    if launch is not None:
        write_atomic(run_path(root, name, number) / FILE, launch)

"""What all verbs share on screen: one JSON object on stdout, everything for people on stderr."""

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, Protocol

import typer

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, nothing else.")]


class Advance(Protocol):
    """Moves a progress bar."""

    def __call__(self, done: int, total: int, text: str = "") -> None:
        """``done`` of ``total`` steps are finished; ``text`` says how it stands."""


def launched_rank() -> int | None:
    """This process's number as torchrun or horovodrun gave it; ``None`` without a launcher."""
    rank = os.environ.get("HOROVOD_RANK") or os.environ.get("RANK")
    return int(rank) if rank else None


def print_json(value: Mapping[str, Any]) -> None:
    """One JSON object on stdout."""
    print(json.dumps(value))


def print_table(table: Any) -> None:
    """A rich table on stdout. A pipe has no width, and a table cut to 80 columns would lose its figures."""
    from rich.console import Console

    console = Console()
    (console if console.is_terminal else Console(width=200)).print(table)


def say(text: str) -> None:
    """A line for people, on stderr: stdout may be a pipe that expects JSON."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def progress(title: str) -> Iterator[Advance]:
    """A progress bar on a terminal; without one a plain line at the start of every tenth.

    Work of less than 2 s shows nothing without a terminal.
    """
    if not sys.stderr.isatty():
        yield _plain_lines(title)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(bar_width=30),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=None, text="")

        def advance(done: int, total: int, text: str = "") -> None:
            bar.update(task, completed=done, total=total, text=text)

        yield advance


def _plain_lines(title: str) -> Advance:
    started, shown = time.perf_counter(), 0

    def advance(done: int, total: int, text: str = "") -> None:
        nonlocal shown
        tenth = 10 * done // max(1, total)
        if tenth > shown and time.perf_counter() - started > 2:
            shown = tenth
            say(f"{title}: {10 * tenth} % {text}".rstrip())

    return advance

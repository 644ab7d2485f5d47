"""A federated run with a folder of its own: what ``efftrain federate RECIPE`` does.

``runs/NAME/`` holds ``recipe.toml`` (resolved), ``metrics.jsonl`` (a line of kind ``round`` and, where it was measured,
one of kind ``eval`` a round), ``clients.jsonl`` and ``clients.csv`` (a row a client and round), ``rounds.csv``,
``journal/`` (what ``--resume`` needs), ``model/`` (as ``save_pretrained`` writes it), ``result.json`` and
``report.html``.
"""

import csv
import fcntl
import json
import os
import resource
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from efftrain.config import load_recipe
from efftrain.errors import CheckpointError, ConfigError, ToolError
from efftrain.federated.journal import Journal
from efftrain.federated.recipe import FederatedRecipe, is_own
from efftrain.federated.results import ClientResult, FederatedResult, RoundResult
from efftrain.federated.rounds import check_model, check_run, run_federated, with_usable_engine
from efftrain.models import load_pretrained, model_class
from efftrain.models.pretrained import WEIGHTS_FILE
from efftrain.report.federated import federated_page
from efftrain.report.page import write_page
from efftrain.report.run import RunFolder, claim_run, clean, next_run_number, run_path, write_atomic


def federate(
    recipe: FederatedRecipe,
    *,
    initial: Path | None = None,
    out: Path = Path("runs"),
    resume: bool = False,
    on_round: Callable[[RoundResult], None] | None = None,
    on_reply: Callable[[int, int, int], None] | None = None,
    on_note: Callable[[str], None] | None = None,
    on_resume: Callable[[list[RoundResult]], None] | None = None,
) -> dict[str, Any]:
    """Run a recipe in this process and leave a run folder.

    Args:
        recipe: What to do.
        initial: Folder of the model to start from, as ``save_pretrained`` wrote it; None starts from fresh weights.
        out: Folder of the run folders.
        resume: Go on with the newest run of this recipe's name that has finished a round, after its last one. If there
            is none, it starts from the beginning.
        on_round: Called after each round.
        on_reply: Called with each accepted update: number of the round, updates so far, updates that it takes.
        on_note: Told before the first round what the run does otherwise than the recipe says.
        on_resume: Told the rounds that earlier processes have done, if there are any.

    Returns:
        The content of ``result.json``, with ``path`` of the folder.

    Raises:
        CheckpointError: ``initial`` or the journal is missing or damaged.
        ConfigError: ``initial`` is another model, the run to resume was started with another recipe, has more rounds
            than are asked for or is still going on, or the recipe does not fit its data or its devices.
        RoundError: Too many rounds were abandoned.
    """
    check_model(recipe)
    state = None if initial is None else read_model(initial, recipe)
    recipe, note = with_usable_engine(recipe)
    notes = [f"clients are trained by the torch engine. {note}"] if note else []
    notes += check_run(recipe)
    if on_note is not None:
        for line in notes:
            on_note(line)
    path = run_path(out, recipe.name, _run_number(recipe, out, resume))
    start = "fresh weights" if initial is None else str(initial)
    with _owned(path), _Writer(path, recipe, start) as writer:
        if writer.done and on_resume is not None:
            on_resume(writer.done)

        def on_each(result: RoundResult) -> None:
            writer.round(result)
            if on_round is not None:
                on_round(result)

        finished = run_federated(recipe, initial=state, on_round=on_each, on_reply=on_reply, journal=path / "journal")
        return writer.finish(finished, note)


def read_model(folder: Path, recipe: FederatedRecipe) -> dict[str, torch.Tensor]:
    """The weights of the model in ``folder``.

    Raises:
        CheckpointError: Files are missing or damaged.
        ConfigError: It is another model than the recipe's.
    """
    if is_own(recipe.model.name):
        return read_weights(folder / WEIGHTS_FILE)
    model = load_pretrained(folder)
    if model.name != recipe.model.name:
        raise ConfigError(f"--initial {folder} holds a {model.name}, the recipe trains a {recipe.model.name}.")
    return model.state_dict()


def save_model(recipe: FederatedRecipe, state: Mapping[str, torch.Tensor], folder: Path) -> None:
    """As ``save_pretrained`` writes it; of a model of the user's own the weights alone."""
    if is_own(recipe.model.name):
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"{WEIGHTS_FILE}.part"
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, part)
        part.replace(folder / WEIGHTS_FILE)
        return
    model = model_class(recipe.model.name).from_config(recipe.model.options)
    model.load_state_dict(state)
    model.save_pretrained(folder)


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file.

    Raises:
        CheckpointError: There is none, or it is damaged.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as weights: {error}") from error


def peak_rss_bytes() -> int:
    """Most memory that this process has had in RAM, as the system counts it."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


@contextmanager
def _owned(path: Path) -> Iterator[None]:
    """Keep a run folder to this process. The system lets go of it when the process ends, however it ends.

    Raises:
        ConfigError: Another process has it.
    """
    folder = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(folder)
        raise ConfigError(
            f"{path} belongs to a run that is still going on; wait for its end, or start a new run without --resume"
        ) from None
    try:
        yield
    finally:
        os.close(folder)


class _Writer:
    """The files of one run."""

    def __init__(self, path: Path, recipe: FederatedRecipe, start: str) -> None:
        self._path, self._recipe = path, recipe
        self._folder = RunFolder(path)
        self._folder.write_recipe(recipe)
        self.done = done = Journal(path / "journal").results()
        # A run that goes on started from what it was first given, whatever this process is given.
        started_from = path / "journal" / "started_from.txt"
        if not done:
            write_atomic(started_from, start)
        self._start = started_from.read_text(encoding="utf-8") if started_from.exists() else start
        # The journal is what counts: a line that was logged for a round that it does not have comes again.
        self._folder.rewind(-1)
        self._uplink_bytes = 0
        for result in done:
            self._log(result)
        self._clients = _Rows(path / "clients.jsonl", len(done))

    def round(self, result: RoundResult) -> None:
        """Write one round's lines."""
        self._clients.add(result.clients)
        self._log(result)

    def finish(self, finished: FederatedResult, engine_note: str) -> dict[str, Any]:
        """Write what is left."""
        save_model(self._recipe, finished.state, self._path / "model")
        figures = {
            "path": str(self._path),
            "kind": "federated",
            **finished.to_dict(),
            "started_from": self._start,
            "engine_note": engine_note,
            "peak_rss_bytes": peak_rss_bytes(),
        }
        result = self._folder.finish(figures)
        _write_csv(self._path / "rounds.csv", [one.to_dict() for one in finished.rounds], _ROUND_COLUMNS)
        clients = self._clients.read()
        _write_csv(self._path / "clients.csv", clients, _CLIENT_COLUMNS)
        rounds = [clean(one.to_dict()) for one in finished.rounds]
        try:
            write_page(federated_page(result, rounds, clients), self._path / "report.html")
        except ToolError:  # no matplotlib: a run without a picture is a run all the same
            (self._path / "report.html").unlink(missing_ok=True)
        return result

    def _log(self, result: RoundResult) -> None:
        self._uplink_bytes += result.uplink_bytes
        step = result.round
        self._folder.log("round", step=step, **result.to_dict())
        self._folder.log("step", step=step, loss=result.train_loss, step_s=result.train_s)
        if result.measured:
            shared = {"accuracy": result.accuracy, "loss": result.loss, "wire_bytes": self._uplink_bytes}
            self._folder.log("eval", step=step, **shared)

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._folder.close()
        self._clients.close()


_CLIENT_COLUMNS = (*(spec.name for spec in fields(ClientResult)), "fits")
_ROUND_COLUMNS = tuple(
    spec.name for spec in fields(RoundResult) if spec.name not in ("clients", "reasons", "accuracy_per_person")
)


class _Rows:
    """``clients.jsonl``: a row a client and round. Rows of rounds after ``last`` are of a process that was killed."""

    def __init__(self, path: Path, last: int) -> None:
        self._path = path
        kept = []
        if path.exists():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            for number, line in enumerate(lines, 1):
                if line.endswith("\n") and _round_of(line, f"{path}, line {number}") <= last:
                    kept.append(line)
        write_atomic(path, "".join(kept))
        self._file = path.open("a", encoding="utf-8")

    def add(self, clients: tuple[ClientResult, ...]) -> None:
        """Append rows."""
        self._file.write("".join(json.dumps(clean(row.to_dict())) + "\n" for row in clients))
        self._file.flush()

    def read(self) -> list[dict[str, Any]]:
        """All rows."""
        return [json.loads(line) for line in self._path.read_text(encoding="utf-8").splitlines()]

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _round_of(line: str, where: str) -> int:
    try:
        return int(json.loads(line)["round"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{where}, is no row of a client ({error}); take the line out, or start a new run without --resume"
        ) from error


def _write_csv(path: Path, rows: list[dict[str, Any]], columns: tuple[str, ...]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def _run_number(recipe: FederatedRecipe, out: Path, resume: bool) -> int:
    """Claim a new run folder, or find the one to resume: the newest that has rounds to go on from, else the newest that
    this recipe started and that was killed before its first round was done."""
    numbers = range(next_run_number(out, recipe.name) - 1, 0, -1) if resume else range(0)
    for number in numbers:
        path = run_path(out, recipe.name, number)
        done = _num_rounds(path)
        if not done:
            continue
        try:
            old = load_recipe(FederatedRecipe, path / "recipe.toml")
        except ConfigError as error:
            raise ConfigError(
                f"{path} cannot be resumed: {str(error).rstrip('.')}; put its recipe back, or start a new run without "
                "--resume"
            ) from error
        if _same_run(old) != _same_run(recipe):
            changed = [spec.name for spec in fields(recipe) if getattr(old, spec.name) != getattr(recipe, spec.name)]
            raise ConfigError(
                f"{path} was started with other settings in {', '.join(changed)}; resume it with its own "
                "recipe (only server.rounds, fleet.workers and client.timeout_s may change), or start a new run "
                "without --resume"
            )
        if done > recipe.server.rounds:
            raise ConfigError(
                f"{path} has {done} rounds already, but server.rounds is {recipe.server.rounds}, and no round can be "
                "taken back; ask for at least as many, or start a new run without --resume"
            )
        return number
    for number in numbers:
        if _was_started_with(run_path(out, recipe.name, number) / "recipe.toml", recipe):
            return number
    return claim_run(out, recipe.name)


def _num_rounds(path: Path) -> int:
    """Finished rounds in the journal of a run folder."""
    lines = path / "journal" / "rounds.jsonl"
    return lines.read_bytes().count(b"\n") if lines.exists() else 0


def _was_started_with(path: Path, recipe: FederatedRecipe) -> bool:
    if not path.exists():  # it was killed before it wrote one
        return path.parent.is_dir()
    try:
        return _same_run(load_recipe(FederatedRecipe, path)) == _same_run(recipe)
    except ConfigError:  # a run of another kind
        return False


def _same_run(recipe: FederatedRecipe) -> FederatedRecipe:
    """The recipe without what may change between a run and its resumption."""
    return replace(
        recipe,
        server=replace(recipe.server, rounds=10**9),
        fleet=replace(recipe.fleet, workers=1),
        client=replace(recipe.client, timeout_s=1.0),
    )

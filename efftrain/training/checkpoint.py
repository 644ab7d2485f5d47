"""Checkpoints: safetensors and JSON, whole or not at all.

``checkpoints/step-00000100/`` holds ``state/`` (model, optimizer), ``rank-<r>.safetensors`` (random state, feedback)
and ``meta.json`` with the SHA-256 of each file. Everything is written into a ``.partial`` folder that is renamed when
all ranks are done, so a folder without that ending is complete. The newest two are kept.

In ``state/`` is one file of rank 0 if all ranks hold the same, and else one of each rank with what it holds, written by
torch's distributed checkpoints (DCP) in their safetensors form: no pickle. Both are read by DCP, which gives each rank
its part of each tensor, so a checkpoint fits every plan of the same model.

A resumed run goes on to the same bits as one that was never stopped. One exception: uncompressed gradients of three
ranks and more. Their ring adds in an order that follows DDP's buckets, which a fresh process has to find anew, so the
first step after a resume differs by fp32 rounding.

World size changed: the feedback of all old ranks is shared out (see ``compression.redistribute``), and the random state
starts anew from seed and step; model, optimizer and data order go on exactly. One process sends nothing, so it has no
use for feedback: a run that goes on alone forgets what its ranks had not sent, and with momentum correction its
momentum starts from zero, in either direction.
"""

import hashlib
import json
import os
import re
import shutil
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as format_safetensors
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from efftrain.errors import CheckpointError
from efftrain.training.exchange import Exchange, Line
from efftrain.training.job import Job, first_names

FORMAT_VERSION = 2
KEEP = 2
_STATE = "state"
_UNREADABLE = (OSError, SafetensorError, RuntimeError, ValueError, KeyError, CheckpointException)


@dataclass(frozen=True)
class Restored:
    """What a checkpoint knows beside the job."""

    path: Path
    step: int
    extra: dict[str, Any]


class Saver:
    """Writes the checkpoints of a job: at once, or in the background while training goes on.

    In the background, the tensors are copied first, which takes as much memory again, and one checkpoint at a time is
    on its way. A failure is raised by the next call. Where the back end has one line only (Horovod), it writes at once.

    Args:
        folder: The run's ``checkpoints`` folder, on a file system that all ranks share.
        job: What to save.
        background: Let training go on. Every rank makes its saver at the same place.
    """

    def __init__(self, folder: Path, job: Job, *, background: bool = False) -> None:
        self._folder, self._job = folder, job
        self._second = job.exchange.second_line() if background else None
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def save(self, extra: Mapping[str, Any] | None = None) -> Path:
        """Write a checkpoint of all ranks. Every rank calls it after the same step.

        Args:
            extra: Numbers and texts to find again, e.g. the best accuracy. JSON.

        Raises:
            CheckpointError: A file could not be written on some rank (disk full, read-only), now or in the background
                since the last call. Older checkpoints are untouched.
        """
        self.finish()
        path = self._folder / f"step-{self._job.num_steps:08d}"
        if self._second is None:
            snapshot = _Snapshot.of(self._job, extra or {}, copy=False)
            _save(path, snapshot, self._job.exchange, None)
        else:
            snapshot = _Snapshot.of(self._job, extra or {}, copy=True)
            line, group = self._second
            self._thread = threading.Thread(target=self._in_background, args=(path, snapshot, line, group), daemon=True)
            self._thread.start()
        return path

    def finish(self) -> None:
        """Wait for what is on its way.

        Raises:
            CheckpointError: It could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _in_background(self, path: Path, snapshot: "_Snapshot", line: Line, group: ProcessGroup | None) -> None:
        try:
            _save(path, snapshot, line, group)
        except Exception as error:
            self._error = error


def save_checkpoint(folder: Path, job: Job, *, extra: Mapping[str, Any] | None = None) -> Path:
    """Write one checkpoint at once; see ``Saver``."""
    return Saver(folder, job).save(extra)


def load_checkpoint(folder: Path, job: Job, *, seed: int) -> Restored | None:
    """Restore the newest checkpoint into ``job``, or return ``None`` if there is none. Every rank calls it.

    Args:
        folder: The run's ``checkpoints`` folder.
        job: Built as for the run that wrote it.
        seed: Of the run; starts the random state anew, alike on the ranks of a replica, when the axes changed.

    Raises:
        CheckpointError: Damaged, or of another model. The message names file, expected and found.
    """
    found = complete_checkpoints(folder)
    if not found:
        return None
    path = found[-1]
    meta = _read_meta(path)
    own = [_parse(path, f"rank-{rank}.safetensors", meta) for rank in range(meta["world_size"])]
    _check_state(path, meta)
    try:
        tensors = job.expect(_shapes(path / _STATE), meta["numbers"])
        _fill(path / _STATE, tensors)
        job.load_state_dict(tensors, meta["numbers"])
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    exchange = job.exchange
    exchange.load_state_dicts([_with_prefix(state, "exchange/") for state in own])
    if meta.get("axes") == exchange.axes:
        _restore_random(own[exchange.rank])
    else:
        torch.manual_seed(hash_seed(seed, job.num_steps, exchange.replica))
    return Restored(path, job.num_steps, meta["extra"])


def export_model(path: Path, job: Job) -> None:
    """Write the whole model of a job into one safetensors file; see ``Job.export``.

    What a plan has divided goes through a folder beside ``path``, as in a checkpoint; rank 0 needs the memory of the
    whole model.
    """
    exchange, what = job.exchange, f"model {path}"
    partial = _partial(path)
    weights = {name: value for name, value in job.state_dict()[0].items() if name.startswith("model/")}
    with _Together(exchange, what):
        if exchange.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)  # by a crash
            (partial / _STATE).mkdir(parents=True)
    try:
        if exchange.is_divided:
            with _Together(exchange, what):
                _save_divided(partial / _STATE, weights, None)
        with _Together(exchange, what):
            if exchange.rank == 0:
                if exchange.is_divided:
                    weights = _empty_of(partial / _STATE)
                    _fill(partial / _STATE, weights)
                _write(partial / path.name, format_safetensors(_with_prefix(weights, "model/")))
                (partial / path.name).replace(path)
    finally:
        if exchange.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)


def load_model(checkpoint: Path, model: nn.Module) -> None:
    """Put the weights of a checkpoint into a whole model, in one process, whatever plan wrote them.

    Args:
        checkpoint: A finished one, of ``complete_checkpoints``.
        model: Of the same kind; its tensors are overwritten.

    Raises:
        CheckpointError: Damaged, or of another model.
    """
    meta = _read_meta(checkpoint)
    _check_state(checkpoint, meta)
    first = first_names(model)
    own = {f"model/{first[name]}": value for name, value in model.state_dict().items()}
    shapes = _shapes(checkpoint / _STATE)
    for name, value in own.items():
        if shapes.get(name) != tuple(value.shape):
            raise CheckpointError(
                f"{checkpoint}: tensor {name.removeprefix('model/')!r}: expected {tuple(value.shape)}, found "
                f"{shapes.get(name, 'no such tensor')}; is it of another model?"
            )
    _fill(checkpoint / _STATE, own)


def complete_checkpoints(folder: Path) -> list[Path]:
    """All finished checkpoints below ``folder``, the newest last."""
    if not folder.is_dir():
        return []
    found = {int(m[1]): p for p in folder.iterdir() if p.is_dir() and (m := re.fullmatch(r"step-(\d{8,})", p.name))}
    return [found[step] for step in sorted(found)]


def hash_seed(*parts: int) -> int:
    """One 63-bit seed from several numbers, without the correlations of adding them."""
    digest = hashlib.sha256(",".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@dataclass(frozen=True, eq=False)
class _Snapshot:
    """What a checkpoint holds of this rank."""

    tensors: dict[str, Tensor]
    numbers: dict[str, Any]
    own: dict[str, Tensor]
    extra: dict[str, Any]
    axes: str
    is_divided: bool

    @classmethod
    def of(cls, job: Job, extra: Mapping[str, Any], *, copy: bool) -> "_Snapshot":
        tensors, numbers = job.state_dict()
        own = _own_state(job.exchange)
        if copy:
            tensors, own = ({name: value.clone() for name, value in state.items()} for state in (tensors, own))
        return cls(tensors, numbers, own, json.loads(json.dumps(extra)), job.exchange.axes, job.exchange.is_divided)


def _save(path: Path, snapshot: _Snapshot, line: Line, group: ProcessGroup | None) -> None:
    partial, what = _partial(path), f"checkpoint {path}"
    try:
        with _Together(line, what):
            if line.rank == 0:
                path.parent.mkdir(parents=True, exist_ok=True)
                for left in path.parent.glob("step-*.partial"):  # by a crash
                    shutil.rmtree(left)
                (partial / _STATE).mkdir(parents=True)
        with _Together(line, what):
            _write(partial / f"rank-{line.rank}.safetensors", format_safetensors(snapshot.own))
            if line.rank == 0 and not snapshot.is_divided:
                _write(partial / _STATE / "shared.safetensors", format_safetensors(snapshot.tensors))
        if snapshot.is_divided:
            with _Together(line, what):
                _save_divided(partial / _STATE, snapshot.tensors, group)
        with _Together(line, what):
            if line.rank == 0:
                _commit(path, snapshot, line.world_size)
    except CheckpointError:
        if line.rank == 0:  # do not fill a full disk any further
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _save_divided(folder: Path, tensors: dict[str, Tensor], group: ProcessGroup | None) -> None:
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    _quietly(lambda: save_distributed(tensors, storage_writer=writer, process_group=group))


def _commit(path: Path, snapshot: _Snapshot, world_size: int) -> None:
    """Checksums, the new name, and away with the oldest."""
    partial = _partial(path)
    found = sorted(p.relative_to(partial) for p in partial.rglob("*.safetensors"))
    meta = {
        "format_version": FORMAT_VERSION,
        "world_size": world_size,
        "axes": snapshot.axes,
        "numbers": snapshot.numbers,
        "extra": snapshot.extra,
        "files": {name.as_posix(): _sha256((partial / name).read_bytes()) for name in found},
    }
    meta["sha256"] = _meta_sha256(meta)
    _write(partial / "meta.json", json.dumps(meta, indent=2).encode())
    if path.exists():  # the epochs of a finished run were changed to end at the same step
        _remove(path)
    partial.rename(path)
    for old in complete_checkpoints(path.parent)[:-KEEP]:
        _remove(old)


class _Together:
    """If the block fails on one rank, it fails on all: nobody waits for a rank that is gone."""

    def __init__(self, line: Line, what: str) -> None:
        self._line, self._what = line, what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None and not isinstance(error, Exception):
            return
        num_failed = self._line.sum([float(error is not None)])[0]
        if error is not None:
            raise CheckpointError(
                f"{self._what} could not be written: {error}; free or unlock the disk. Older checkpoints are untouched."
            ) from error
        if num_failed:
            raise CheckpointError(f"{self._what}: {num_failed:.0f} other ranks could not write their part")


def _own_state(exchange: Exchange) -> dict[str, Tensor]:
    state = {f"exchange/{name}": value for name, value in exchange.state_dict().items()}
    state["random/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        state["random/cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_random(state: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(state["random/cpu"])
    if "random/cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["random/cuda"])


def _with_prefix(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _remove(path: Path) -> None:
    """Rename first: a crash in the middle must not leave half a checkpoint that looks complete."""
    going = path.with_name(path.name + ".old.partial")
    path.rename(going)
    shutil.rmtree(going)


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        version, sha256 = meta["format_version"], meta["sha256"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"checkpoint file {path / 'meta.json'} is missing or damaged ({type(error).__name__}: {error}); delete the "
            "folder to use an older checkpoint"
        ) from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"checkpoint {path} has format version {version}, expected {FORMAT_VERSION}; resume it with the efftrain "
            "that wrote it"
        )
    if sha256 != _meta_sha256(meta):
        raise CheckpointError(
            f"checkpoint file {path / 'meta.json'}: its checksum does not match, it is damaged; delete the folder to "
            "use an older checkpoint"
        )
    return dict(meta)


def _meta_sha256(meta: Mapping[str, Any]) -> str:
    """Of everything in ``meta`` but the checksum itself."""
    rest = {name: value for name, value in meta.items() if name != "sha256"}
    return _sha256(json.dumps(rest, sort_keys=True).encode())


def _check_state(path: Path, meta: Mapping[str, Any]) -> None:
    for name in meta["files"]:
        if name.startswith(f"{_STATE}/"):
            _read(path, name, meta)


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Of the whole tensors in files whose checksums are right."""
    return {name: tuple(one.size) for name, one in _metadata(folder).items()}


def _empty_of(folder: Path) -> dict[str, Tensor]:
    """Room for the whole tensors."""
    return {name: torch.empty(one.size, dtype=one.properties.dtype) for name, one in _metadata(folder).items()}


def _metadata(folder: Path) -> dict[str, TensorStorageMetadata]:
    try:
        found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except _UNREADABLE as error:
        raise CheckpointError(f"{folder} cannot be read ({error}); delete it to use an older checkpoint") from error
    return {name: one for name, one in found.items() if isinstance(one, TensorStorageMetadata)}


def _fill(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Read this rank's part of each tensor, without the other ranks."""
    reader = HuggingFaceStorageReader(str(folder))
    try:
        _quietly(lambda: load_distributed(tensors, storage_reader=reader, no_dist=True))
    except _UNREADABLE as error:
        raise CheckpointError(f"{folder} cannot be read ({error}); delete it to use an older checkpoint") from error


def _quietly(action: Callable[[], object]) -> None:
    """torch warns that a single process needs no process group, which we know."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        action()


def _parse(path: Path, name: str, meta: Mapping[str, Any]) -> dict[str, Tensor]:
    try:
        return parse_safetensors(_read(path, name, meta))
    except SafetensorError as error:
        raise CheckpointError(
            f"checkpoint file {path / name} cannot be read ({error}); delete the folder to use an older checkpoint"
        ) from error


def _read(path: Path, name: str, meta: Mapping[str, Any]) -> bytes:
    expected = meta["files"].get(name)
    try:
        data = (path / name).read_bytes()
        if _sha256(data) != expected:
            raise CheckpointError(
                f"checkpoint file {path / name}: SHA-256 is {_sha256(data)}, expected {expected}; "
                "it is damaged. Delete the folder to use an older checkpoint."
            )
        return data
    except OSError as error:
        raise CheckpointError(
            f"checkpoint file {path / name} cannot be read ({error}); delete the folder to use an older checkpoint"
        ) from error


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()

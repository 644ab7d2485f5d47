"""The journal: what a run needs to go on to the same bits after it was killed at any point.

``journal/rounds.jsonl`` has one line a round, only ever appended: the round's figures, what driver, selection, mailbox
and strategy remember as plain values, and the SHA-256 of the tensors that belong to it. Tensors are safetensors files:
``round-00000012.safetensors`` (global model, model versions on the way, the strategy's own) and
``client-1007-00000012.safetensors`` (what a simulated client keeps: its error feedback). A round is done when its line
is whole; what was written for a round without a line is dropped. Files that no later line needs are deleted after it.

There is no random state to save: everything drawn is a function of the recipe's seed and of counters in the line.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load as parse_safetensors
from safetensors.numpy import save as format_safetensors

from efftrain.errors import CheckpointError
from efftrain.federated.flower import (
    ArrayRecord,
    ConfigRecord,
    MetricRecord,
    RecordDict,
    Strategy,
    read_arrays,
    write_arrays,
)
from efftrain.federated.results import RoundResult

FORMAT_VERSION = 1
_KEEP = 2
"""Models of so many rounds are kept."""

Tensors = dict[str, npt.NDArray[np.generic]]


class Journal:
    """Reads and writes one run's journal.

    Args:
        folder: ``runs/NAME/journal``; made if it is not there.

    Raises:
        CheckpointError: A line in the middle is damaged, of another format version, or not of the next round.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "rounds.jsonl"
        self._clients: dict[str, tuple[int, str]] = {}
        self.lines: list[dict[str, Any]] = self._read_lines()
        """One a finished round."""
        for line in self.lines:
            for node_id, sha256 in line["clients"].items():
                self._clients[node_id] = (line["round"], sha256)
        self._drop_unfinished()

    @property
    def round(self) -> int:
        """The last finished round; 0 if there is none."""
        return int(self.lines[-1]["round"]) if self.lines else 0

    def results(self) -> list[RoundResult]:
        """The figures of all finished rounds."""
        return [_result(line["result"]) for line in self.lines]

    def write(
        self, result: RoundResult, memory: Mapping[str, Any], tensors: Tensors, clients: Mapping[int, RecordDict]
    ) -> None:
        """Append one round.

        Args:
            result: Its figures.
            memory: Plain values, as ``json`` writes and reads them.
            tensors: Everything else that ``load`` gives back.
            clients: Node id -> new state of every client whose state may have changed.

        Raises:
            CheckpointError: A file could not be written.
        """
        number = result.round
        try:
            written = {}
            for node_id, state in clients.items():
                data = _format_state(state)
                _write(self._client_path(str(node_id), number), data)
                written[str(node_id)] = _sha256(data)
            data = format_safetensors({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()})
            _write(self._round_path(number), data, sync=True)
            line = {
                "format_version": FORMAT_VERSION,
                "round": number,
                "sha256": _sha256(data),
                "clients": written,
                "result": result.to_dict(),
                "memory": dict(memory),
            }
            text = json.dumps(line)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(f"{_sha256(text.encode())} {text}\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise CheckpointError(f"journal {self._folder} could not be written: {error}; free the disk") from error
        self.lines.append(line)
        for name, sha256 in written.items():
            if name in self._clients:
                self._client_path(name, self._clients[name][0]).unlink(missing_ok=True)
            self._clients[name] = (number, sha256)
        self._round_path(number - _KEEP).unlink(missing_ok=True)

    def load(self) -> tuple[dict[str, Any], Tensors]:
        """Memory and tensors of the last finished round.

        Raises:
            CheckpointError: A file is missing or damaged.
        """
        line = self.lines[-1]
        return line["memory"], self._parse(self._round_path(line["round"]), line["sha256"])

    def client_states(self) -> Iterable[tuple[int, RecordDict]]:
        """What every client kept, by node id.

        Raises:
            CheckpointError: A file is missing or damaged.
        """
        for node_id, (number, sha256) in self._clients.items():
            yield int(node_id), _parse_state(self._parse(self._client_path(node_id, number), sha256))

    def _read_lines(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        lines: list[dict[str, Any]] = []
        data = self._path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        for number, row in enumerate(whole.splitlines(), 1):
            sha256, _, text = row.partition(b" ")
            if _sha256(text) != sha256.decode(errors="replace"):
                raise CheckpointError(
                    f"{self._path}, line {number}: its checksum does not match, it is damaged; start a new run"
                )
            line = json.loads(text)
            if line["format_version"] != FORMAT_VERSION:
                raise CheckpointError(
                    f"{self._path} has format version {line['format_version']}, expected {FORMAT_VERSION}; resume it "
                    "with the efftrain that wrote it"
                )
            if line["round"] != number:
                raise CheckpointError(
                    f"{self._path}, line {number} is of round {line['round']}, expected round {number}: two processes "
                    "wrote it, or lines were taken out; start a new run"
                )
            lines.append(line)
        if len(whole) != len(data):  # a line that was cut off: its round is not done
            with self._path.open("r+b") as file:
                file.truncate(len(whole))
        return lines

    def _drop_unfinished(self) -> None:
        """Files of a round that has no line."""
        needed = {self._client_path(node_id, number) for node_id, (number, _) in self._clients.items()}
        needed |= {self._round_path(number) for number in range(self.round - _KEEP + 1, self.round + 1)}
        for path in self._folder.glob("*.safetensors"):
            if path not in needed:
                path.unlink()

    def _round_path(self, number: int) -> Path:
        return self._folder / f"round-{number:08d}.safetensors"

    def _client_path(self, node_id: str, number: int) -> Path:
        return self._folder / f"client-{node_id}-{number:08d}.safetensors"

    def _parse(self, path: Path, sha256: str) -> Tensors:
        try:
            data = path.read_bytes()
            if _sha256(data) != sha256:
                raise CheckpointError(f"{path}: its checksum does not match, it is damaged; start a new run")
            return dict(parse_safetensors(data))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}); start a new run") from error


def strategy_memory(strategy: Strategy) -> tuple[dict[str, Any], Tensors]:
    """What a strategy has learned: its attributes, as far as they are numbers, texts or tensors.

    Returns:
        Attribute -> what it is, and the tensors that it is made of. A strategy inside another one is looked into.
    """
    layout: dict[str, Any] = {}
    tensors: Tensors = {}
    for name, value in vars(strategy).items():
        if value is None or isinstance(value, (bool, int, float, str)):
            layout[name] = ["value", value]
        elif isinstance(value, Strategy):
            inner, inner_tensors = strategy_memory(value)
            layout[name] = ["strategy", inner]
            tensors |= {f"{name}/{key}": tensor for key, tensor in inner_tensors.items()}
        elif isinstance(value, ArrayRecord):
            layout[name] = ["record", list(value)]
            tensors |= {f"{name}/{key}": tensor for key, tensor in read_arrays(value).items()}
        elif isinstance(value, dict) and value and all(isinstance(one, np.ndarray) for one in value.values()):
            layout[name] = ["dict", list(value)]
            tensors |= {f"{name}/{key}": tensor for key, tensor in value.items()}
        elif isinstance(value, list) and value and all(isinstance(one, np.ndarray) for one in value):
            layout[name] = ["list", [str(number) for number in range(len(value))]]
            tensors |= {f"{name}/{number}": tensor for number, tensor in enumerate(value)}
    return layout, tensors


def restore_strategy(strategy: Strategy, layout: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """Go on from ``strategy_memory``."""
    for name, (kind, value) in layout.items():
        inside = {key.removeprefix(f"{name}/"): one for key, one in tensors.items() if key.startswith(f"{name}/")}
        if kind == "strategy":
            restore_strategy(getattr(strategy, name), value, inside)
        elif kind == "value":
            setattr(strategy, name, value)
        elif kind == "record":
            setattr(strategy, name, write_arrays({key: inside[key] for key in value}))
        elif kind == "dict":
            setattr(strategy, name, {key: inside[key] for key in value})
        else:
            setattr(strategy, name, [inside[key] for key in value])


def _format_state(state: RecordDict) -> bytes:
    """A client's records of arrays as tensors, its records of settings as JSON in the metadata of the file."""
    tensors: Tensors = {}
    config: dict[str, dict[str, Any]] = {}
    for name, record in state.items():
        if isinstance(record, ArrayRecord):
            tensors |= {f"{name}|{key}": tensor.copy() for key, tensor in read_arrays(record).items()}
        else:
            config[name] = {"config": isinstance(record, ConfigRecord), "values": dict(record.items())}
    text = np.frombuffer(json.dumps(config).encode(), np.uint8)
    return format_safetensors({**tensors, "|config": text})


def _parse_state(tensors: Tensors) -> RecordDict:
    state = RecordDict()
    for name, entry in json.loads(tensors["|config"].tobytes()).items():
        state[name] = ConfigRecord(entry["values"]) if entry["config"] else MetricRecord(entry["values"])
    records: dict[str, Tensors] = {}
    for key, tensor in tensors.items():
        record, _, name = key.partition("|")
        if record:
            records.setdefault(record, {})[name] = tensor
    for record, arrays in records.items():
        state[record] = write_arrays(arrays)
    return state


def _result(row: Mapping[str, Any]) -> RoundResult:
    known = {spec.name for spec in fields(RoundResult)}
    values = {name: value for name, value in row.items() if name in known}
    return RoundResult(**{**values, "reasons": tuple(values["reasons"])})


def _write(path: Path, data: bytes, *, sync: bool = False) -> None:
    with path.open("wb") as file:
        file.write(data)
        if sync:
            file.flush()
            os.fsync(file.fileno())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()

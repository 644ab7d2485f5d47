"""The one door to Flower: its version is checked here, and nothing else imports ``flwr``.

Note [nothing phones home]
    Flower sends usage figures and asks for updates unless two variables of the environment say no. They are read when
    ``flwr`` is imported, so they are set here before; a user who sets ``FLWR_TELEMETRY_ENABLED=1`` keeps it. A process
    that Flower's own commands start (``flower-superlink``, ``flwr run``) imports ``flwr`` first: export them there.

Note [past Flower's wrappers]
    A look into one of Flower's records costs a microsecond, a value put into one three, a message ten: each time types
    are checked and objects of ``typing`` made for it. In a round of 10,000 clients that is seconds. So what is known to
    be right is put together by the functions here (``make_...``, ``copy_...``), and ``values_of`` is the dict inside.
"""

import importlib.metadata
import io
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from efftrain.errors import ToolError

_OLDEST, _TOO_NEW = (1, 41), (1, 42)
_INSTALL = "pip install 'efftrain[federated]'"


def check_version(version: str | None) -> None:
    """Refuse a Flower that this adapter was not written for.

    Args:
        version: Version of the installed ``flwr``, None if there is none.

    Raises:
        ToolError: It is missing or outside ``>=1.41,<1.42``; the message has the line that installs the right one.
    """
    if version is None:
        raise ToolError(f"federated training needs Flower, which is not installed. Install it: {_INSTALL}")
    found = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if not _OLDEST <= found < _TOO_NEW:
        raise ToolError(
            f"Flower {version} is installed, this efftrain works with flwr>=1.41,<1.42 (its message and grid "
            f"interfaces change between minor versions). Install the right one: {_INSTALL}"
        )


def _installed_version() -> str | None:
    try:
        return importlib.metadata.version("flwr")
    except importlib.metadata.PackageNotFoundError:
        return None


def _stay_at_home() -> None:
    """See Note [nothing phones home]."""
    told_by_user = "FLWR_TELEMETRY_ENABLED" in os.environ
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
    telemetry = sys.modules.get("flwr.supercore.telemetry")
    if telemetry is not None and not told_by_user:  # flwr came first: its copy of the variable is what counts
        telemetry.FLWR_TELEMETRY_ENABLED = "0"  # type: ignore[attr-defined]


VERSION = _installed_version()
check_version(VERSION)
_stay_at_home()

with warnings.catch_warnings():
    # flwr 1.41 imports names that click and others are about to drop. That is for Flower to mend, and must not stop
    # a program that treats warnings as errors.
    warnings.simplefilter("ignore", DeprecationWarning)
    try:
        from flwr.app import (
            Array,
            ArrayRecord,
            ConfigRecord,
            Context,
            Error,
            Message,
            MessageType,
            MetricRecord,
            RecordDict,
        )
        from flwr.app.metadata import Metadata
        from flwr.clientapp import ClientApp
        from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
        from flwr.serverapp import Grid, ServerApp
        from flwr.serverapp.strategy import (
            Bulyan,
            FedAdagrad,
            FedAdam,
            FedAvg,
            FedAvgM,
            FedMedian,
            FedProx,
            FedTrimmedAvg,
            FedYogi,
            Krum,
            MultiKrum,
            Strategy,
        )
        from flwr.supercore.run import Run
        from flwr.supercore.task_identity import TaskIdentity
    except ImportError as error:
        raise ToolError(
            f"Flower {VERSION} is installed but cannot be imported ({error}). Install it again: {_INSTALL}"
        ) from error

MEAN_STRATEGIES: tuple[type[Strategy], ...] = (FedAvg, FedProx, FedAvgM, FedAdam, FedYogi, FedAdagrad)
"""Strategies of Flower that look at nothing but the weighted mean of the replies."""

__all__ = [
    "MEAN_STRATEGIES",
    "SUPERLINK_NODE_ID",
    "VERSION",
    "Array",
    "ArrayRecord",
    "Bulyan",
    "ClientApp",
    "ConfigRecord",
    "ConfigValue",
    "Context",
    "Error",
    "ErrorCode",
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedMedian",
    "FedProx",
    "FedTrimmedAvg",
    "FedYogi",
    "Grid",
    "Krum",
    "Message",
    "MessageType",
    "MetricRecord",
    "MultiKrum",
    "RecordDict",
    "Run",
    "ServerApp",
    "Strategy",
    "category",
    "check_version",
    "copy_message",
    "copy_records",
    "identify_process",
    "make_array",
    "make_config",
    "make_content",
    "make_metrics",
    "make_record",
    "quiet",
    "read_array",
    "read_arrays",
    "record_of",
    "values_of",
    "write_array",
    "write_arrays",
]

Tensors = Mapping[str, npt.NDArray[np.generic]]
ConfigValue = bool | float | int | str
T = TypeVar("T")
R = TypeVar("R", ArrayRecord, ConfigRecord, MetricRecord)


def identify_process(run_id: int) -> None:
    """Give this process the identity that ``Message(...)`` asks for, unless Flower's own commands have set one.

    Outside of a ServerApp started by Flower no instruction message can be built without it.
    """
    for name, value in (("run_id", run_id), ("node_id", SUPERLINK_NODE_ID), ("task_id", 0)):
        try:
            getattr(TaskIdentity, name)
        except RuntimeError:  # how Flower says that it is not set
            setattr(TaskIdentity, name, value)


def category(message: Message) -> str:
    """``"train"``, ``"evaluate"`` or ``"query"``: the type of a message without its action."""
    return message.metadata.message_type.split(".")[0]


def values_of(record: Mapping[str, T]) -> dict[str, T]:
    """The dict in one of Flower's records itself. See Note [past Flower's wrappers]."""
    values: dict[str, T] = record.__dict__["_data"]
    return values


def copy_records(content: RecordDict) -> RecordDict:
    """A copy in which records can be added, replaced and changed without touching the original.

    Strategies put one ``RecordDict`` into all messages of a round. On a wire every node gets its own; in one process
    this copy is what keeps a client that changes its message from changing everybody's. Array bytes are shared.
    """
    return make_content({name: _with(record, dict(values_of(record))) for name, record in values_of(content).items()})


def make_content(records: dict[str, ArrayRecord | ConfigRecord | MetricRecord]) -> RecordDict:
    """``RecordDict(records)`` around the dict itself, unchecked."""
    return _with(_NO_RECORDS, records)


def make_config(values: Mapping[str, object]) -> ConfigRecord:
    """``ConfigRecord(values)``, unchecked."""
    return _with(_NO_CONFIG, dict(values))


def make_metrics(values: Mapping[str, float]) -> MetricRecord:
    """``MetricRecord(values)``, unchecked."""
    return _with(_NO_METRICS, dict(values))


def _with(record: T, values: dict[str, Any]) -> T:
    """As ``record.copy()``, but with these values."""
    copied, own = object.__new__(type(record)), record.__dict__
    copied.__dict__.update(_check_key_fn=own["_check_key_fn"], _check_value_fn=own["_check_value_fn"], _data=values)
    return copied


def copy_message(message: Message) -> Message:
    """A message with metadata and records of its own; see ``copy_records``."""
    copied, metadata = object.__new__(Message), object.__new__(Metadata)
    metadata.__dict__.update(message.metadata.__dict__)
    copied.__dict__.update(_metadata=metadata, _content=copy_records(message.content), _error=None)
    return copied


def record_of(content: RecordDict, name: str, kind: type[R]) -> R:
    """The record of that name and kind, as in ``content.config_records[name]``. That view holds itself, and so keeps
    the arrays beside the record in memory until Python next looks for cycles.

    Raises:
        KeyError: There is none.
    """
    record = values_of(content)[name]
    if not isinstance(record, kind):
        raise KeyError(name)
    return record


def write_array(tensor: npt.NDArray[np.generic]) -> Array:
    """``Array(tensor)``, the same bytes at a tenth of its time: a round makes one a tensor and client."""
    if not tensor.flags.c_contiguous:
        tensor = np.asarray(tensor, order="C")
    name, header = _npy_header(tensor.dtype, tensor.shape)
    return make_array(name, tensor.shape, "numpy.ndarray", b"".join((header, tensor.data)))


def make_array(dtype: str, shape: tuple[int, ...], stype: str, data: bytes) -> Array:
    """``Array(dtype, shape, stype, data)`` past its search for what it was given, which takes longer than the data."""
    array = Array.__new__(Array)
    array.__dict__.update(dtype=dtype, shape=shape, stype=stype, data=data)
    return array


def write_arrays(tensors: Tensors) -> ArrayRecord:
    """A record of tensors; see ``write_array``."""
    return make_record({name: write_array(np.asarray(tensor)) for name, tensor in tensors.items()})


def make_record(arrays: Mapping[str, Array]) -> ArrayRecord:
    """``ArrayRecord(arrays)`` of the arrays themselves: the constructor would make each of them again."""
    return _with(_NO_ARRAYS, dict(arrays))


def read_array(array: Array) -> npt.NDArray[np.generic]:
    """``array.numpy()`` without a copy: read-only, and valid as long as ``array`` is.

    The array remembers it, for all clients of a round read the same model.
    """
    read: tuple[bytes, npt.NDArray[np.generic]] | None = array.__dict__.get("_read")
    if read is not None and read[0] is array.data:
        return read[1]
    layout = _npy_layout(array.data[:_HEADER_PEEK]) if array.stype == "numpy.ndarray" else None
    if layout is None:
        return array.numpy()
    offset, dtype, shape, count = layout
    if len(array.data) != offset + count * dtype.itemsize:
        raise ValueError(f"an array of shape {shape} has {len(array.data) - offset} bytes")
    tensor: npt.NDArray[np.generic] = np.frombuffer(array.data, dtype, count, offset).reshape(shape)
    array.__dict__["_read"] = array.data, tensor
    return tensor


def read_arrays(record: ArrayRecord) -> dict[str, npt.NDArray[np.generic]]:
    """All tensors of a record; see ``read_array``."""
    return {name: read_array(array) for name, array in values_of(record).items()}


_NO_RECORDS, _NO_ARRAYS, _NO_CONFIG, _NO_METRICS = RecordDict(), ArrayRecord(), ConfigRecord(), MetricRecord()
_HEADER_PEEK = 128  # what np.save writes for any tensor of up to about ten dims


@lru_cache(maxsize=1024)
def _npy_header(dtype: np.dtype[np.generic], shape: tuple[int, ...]) -> tuple[str, bytes]:
    """Flower's name of the type, and what NumPy's format has before the elements."""
    buffer = io.BytesIO()
    header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    return dtype.name, buffer.getvalue()


@lru_cache(maxsize=1024)
def _npy_layout(start: bytes) -> tuple[int, np.dtype[np.generic], tuple[int, ...], int] | None:
    """Offset of the elements, type, shape and number; None where only NumPy's own reader will do."""
    buffer = io.BytesIO(start)
    try:
        if np.lib.format.read_magic(buffer) != (1, 0):
            return None
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(buffer)
    except Exception:  # a header that is longer, or none: np.load says what is wrong with it
        return None
    return None if fortran_order or dtype.hasobject else (buffer.tell(), dtype, shape, math.prod(shape))


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Flower's log lines below WARNING from the console meanwhile."""
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)

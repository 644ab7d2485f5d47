"""The gate: nothing a client sends is believed.

Every reply is checked here before a strategy sees it. What does not fit is refused with a reason; that costs its sender
the round and nobody else anything. Flower's own aggregation believes NaN, negative weights, 1e12 samples and
shapes that merely broadcast, and one reply with other names vetoes the whole round.

The checks, cheapest first: kind of reply, names, sizes of the encoded bytes (before anything is decoded), checksum and
layout (the codec), finiteness, norm, sample count, metrics.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from efftrain.compression import Codec
from efftrain.errors import PayloadError
from efftrain.federated.flower import ArrayRecord, ConfigRecord, Message, MetricRecord
from efftrain.federated.recipe import GateConfig

Floats = npt.NDArray[np.float32]
Tensors = Mapping[str, npt.NDArray[np.generic]]

PAYLOAD_STYPE = "efftrain.payload"
"""``Array.stype`` of an encoded tensor: ``data`` is a payload of ``efftrain.compression``, nothing around it."""
NUM_SAMPLES = "num-examples"
"""Flower's name for the weight of a reply."""


class Refused(Exception):
    """A reply does not pass. The text is the reason; it never leaves ``UplinkGrid``."""


@dataclass(frozen=True)
class Update:
    """What a training reply holds once it has passed."""

    deltas: dict[str, Floats]
    """New minus sent, for every floating-point tensor, in the shapes that were sent."""
    num_samples: int
    metrics: dict[str, float]


def is_trained(tensor: npt.NDArray[np.generic]) -> bool:
    """Whether a tensor of a model travels back: floating point does, counters stay as the server has them."""
    return bool(np.issubdtype(tensor.dtype, np.floating))


def check_update(reply: Message, sent: Tensors, codec: Codec, config: GateConfig, metrics: Sequence[str]) -> Update:
    """Check the reply to a training message and decode it.

    Args:
        reply: With content, from any sender.
        sent: Name -> tensor of the model that went out with the message.
        codec: What the reply must be encoded with, knobs included.
        config: Limits.
        metrics: Metrics beside the sample count that the reply must have; others are refused.

    Raises:
        Refused: For everything that ``uplink_mod`` around an honest client cannot have sent, whatever it is.
    """
    try:
        return _check_update(reply, sent, codec, config, metrics)
    except (Refused, PayloadError) as error:
        raise Refused(str(error)) from error
    except Exception as error:
        # The content was built by somebody else, out of types that promise nothing: a border catches everything.
        raise Refused(f"malformed reply ({type(error).__name__}: {error})") from error


def check_metrics(reply: Message, config: GateConfig, metrics: Sequence[str]) -> tuple[int, dict[str, float]]:
    """Check the reply to an evaluation message: one record of metrics, a sane sample count, finite numbers.

    Returns:
        Number of samples, and the metrics by name.

    Raises:
        Refused: As ``check_update``.
    """
    try:
        if len(reply.content) != 1:
            raise Refused(f"reply has {len(reply.content)} records, expected one record of metrics")
        return _checked_metrics(reply, config, metrics)
    except Refused:
        raise
    except Exception as error:
        raise Refused(f"malformed reply ({type(error).__name__}: {error})") from error


def _check_update(reply: Message, sent: Tensors, codec: Codec, config: GateConfig, metrics: Sequence[str]) -> Update:
    kinds = sorted(type(record).__name__ for record in reply.content.values())
    if kinds != ["ArrayRecord", "MetricRecord"]:
        raise Refused(f"reply has the records {kinds}, expected one ArrayRecord and one MetricRecord")
    arrays = next(record for record in reply.content.values() if isinstance(record, ArrayRecord))
    expected = [name for name, tensor in sent.items() if is_trained(tensor)]
    unknown = [name for name in arrays if name not in expected]
    missing = [name for name in expected if name not in arrays]
    if unknown or missing:
        raise Refused(f"reply has unknown tensors {_few(unknown)}, lacks {_few(missing)}")
    num_samples, values = _checked_metrics(reply, config, metrics)
    for name in expected:
        _check_size(name, arrays, codec, sent[name].size)
    deltas = {}
    square = 0.0
    for name in expected:
        delta = codec.decode(arrays[name].data, max_elements=sent[name].size)
        if delta.size != sent[name].size:
            raise Refused(f"tensor {name!r} has {delta.size} elements, expected {sent[name].size}")
        square += float(np.square(delta, dtype=np.float64).sum())
        deltas[name] = delta.reshape(sent[name].shape)
    norm = math.sqrt(square)
    if not norm <= config.max_update_norm:  # not >, so that NaN is refused
        raise Refused(f"update has norm {norm:.4g}, at most {config.max_update_norm:g} is accepted")
    return Update(deltas, num_samples, values)


def _check_size(name: str, arrays: ArrayRecord, codec: Codec, num_elements: int) -> None:
    array, allowed = arrays[name], codec.encoded_bytes(num_elements)
    if array.stype != PAYLOAD_STYPE or not isinstance(array.data, bytes):
        raise Refused(
            f"tensor {name!r} is a {array.stype!r}, expected {PAYLOAD_STYPE!r}: it was not sent through a codec"
        )
    if len(array.data) > allowed or (codec.fixed_size and len(array.data) != allowed):
        raise Refused(f"tensor {name!r} takes {len(array.data)} bytes, expected {allowed}")


def _checked_metrics(reply: Message, config: GateConfig, metrics: Sequence[str]) -> tuple[int, dict[str, float]]:
    records = [record for record in reply.content.values() if isinstance(record, MetricRecord)]
    if len(records) != 1:
        raise Refused(f"reply has {len(records)} records of metrics, expected one")
    record = records[0]
    if set(record) != {NUM_SAMPLES, *metrics}:
        raise Refused(f"reply has the metrics {_few(sorted(record))}, expected {sorted({NUM_SAMPLES, *metrics})}")
    num_samples = record[NUM_SAMPLES]
    if type(num_samples) is not int:
        raise Refused(f"{NUM_SAMPLES} is {num_samples!r}, expected a whole number")
    if not 1 <= num_samples <= config.max_samples:
        raise Refused(f"{NUM_SAMPLES} is {num_samples}, expected 1 to {config.max_samples}")
    values = {}
    for name in metrics:
        value = record[name]
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise Refused(f"metric {name!r} is {value!r}, expected a finite number")
        values[name] = float(value)
    return num_samples, values


def _few(names: Sequence[str]) -> str:
    """Names of a stranger, cut short: they end up in logs."""
    shown = [name if len(name) <= 40 else name[:40] + "..." for name in names[:4]]
    return f"{shown}" + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def content_bytes(message: Message) -> int:
    """Bytes of the records in a message: array data, 8 a number, names. Flower's framing is not counted.

    Total over anything a client may send: a record that cannot be counted counts as nothing.
    """
    if not message.has_content():
        return 0
    return sum(_record_bytes(record) for record in message.content.values())


def _record_bytes(record: "ArrayRecord | MetricRecord | ConfigRecord") -> int:
    try:
        return record.count_bytes()
    except Exception:
        return 0

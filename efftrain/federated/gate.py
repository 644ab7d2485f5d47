"""The gate: nothing a client sends is believed.

Every reply is checked here before a strategy sees it. What does not fit is refused with a reason; that costs its sender
the round and nobody else anything. Flower's own aggregation believes NaN, negative weights, 1e12 samples and
shapes that merely broadcast, and one reply with other names vetoes the whole round.

The checks, cheapest first: number and kind of records, names, sample count, metrics, sizes of the encoded bytes (before
anything is decoded), checksum and layout (the codec), finiteness, norm. Nothing that a reply claims about its own size
makes the server allocate: what a check needs beyond the decoded update is counted in kilobytes.

Which round and which model a reply belongs to is not for the reply to say. Every message has an id of its own, the
transport names it in the reply, and ``UplinkGrid`` holds for each id on its way the node it went to, the round and the
model; the first reply takes it out. So a second reply, a late one, one of another node, or one to a message that was
never sent finds nothing to belong to.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from efftrain.compression import Codec
from efftrain.errors import PayloadError
from efftrain.federated.flower import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, values_of
from efftrain.federated.recipe import GateConfig

Floats = npt.NDArray[np.float32]
Tensors = Mapping[str, npt.NDArray[np.generic]]

PAYLOAD_STYPE = "efftrain.payload"
"""``Array.stype`` of an encoded tensor: ``data`` is a payload of ``efftrain.compression``, nothing around it."""
_BLOCK = 1 << 14
NUM_SAMPLES = "num-examples"
"""Flower's name for the weight of a reply."""


class Refused(Exception):
    """A reply does not pass. The text is the reason; it never leaves ``UplinkGrid``."""


@dataclass(frozen=True)
class Update:
    """What a training reply holds once it has passed."""

    deltas: dict[str, Floats]
    """New minus sent, flat, for every floating-point tensor."""
    num_samples: int
    metrics: dict[str, float]


def is_trained(tensor: npt.NDArray[np.generic]) -> bool:
    """Whether a tensor of a model travels back: floating point does, counters stay as the server has them."""
    return tensor.dtype.kind == "f"


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
        if len(values_of(reply.content)) != 1:
            raise Refused(f"reply has {len(reply.content)} records, expected one record of metrics")
        return _checked_metrics(reply, config, metrics)
    except Refused:
        raise
    except Exception as error:
        raise Refused(f"malformed reply ({type(error).__name__}: {error})") from error


def _check_update(reply: Message, sent: Tensors, codec: Codec, config: GateConfig, metrics: Sequence[str]) -> Update:
    records = values_of(reply.content)
    if len(records) != 2:
        raise Refused(f"reply has {len(records)} records, expected one ArrayRecord and one MetricRecord")
    kinds = sorted(type(record).__name__ for record in records.values())
    if kinds != ["ArrayRecord", "MetricRecord"]:
        raise Refused(f"reply has the records {kinds}, expected one ArrayRecord and one MetricRecord")
    arrays = values_of(next(record for record in records.values() if isinstance(record, ArrayRecord)))
    sizes = {name: tensor.size for name, tensor in sent.items() if is_trained(tensor)}
    if arrays.keys() != sizes.keys():
        unknown = [name for name in arrays if name not in sizes]
        missing = [name for name in sizes if name not in arrays]
        raise Refused(f"reply has unknown tensors {_few(unknown)}, lacks {_few(missing)}")
    num_samples, values = _checked_metrics(reply, config, metrics)
    for name, size in sizes.items():
        _check_size(name, arrays[name], codec, size)
    deltas = {}
    for name, size in sizes.items():
        delta = deltas[name] = codec.decode(arrays[name].data, max_elements=size)
        if delta.size != size:
            raise Refused(f"tensor {name!r} has {delta.size} elements, expected {size}")
    limit = config.max_update_norm
    with np.errstate(over="ignore", invalid="ignore"):
        rough = _square(deltas, _rough)
    # In fp32 first, ten times as fast: only what comes near the limit is looked at closely. Not >, for NaN is refused.
    if not rough <= 0.9 * limit * limit:
        norm = math.sqrt(_square(deltas, _exact))
        if not norm <= limit:
            raise Refused(f"update has norm {norm:.4g}, at most {limit:g} is accepted")
    return Update(deltas, num_samples, values)


def _check_size(name: str, array: Array, codec: Codec, num_elements: int) -> None:
    data, allowed = array.data, codec.encoded_bytes(num_elements)
    if array.stype != PAYLOAD_STYPE or not isinstance(data, bytes):
        raise Refused(
            f"tensor {name!r} is a {array.stype[:40]!r}, expected {PAYLOAD_STYPE!r}: it was not sent through a codec"
        )
    if len(data) > allowed or (codec.fixed_size and len(data) != allowed):
        raise Refused(f"tensor {name!r} takes {len(data)} bytes, expected {allowed}")


def _square(deltas: Mapping[str, Floats], of_block: Callable[[Floats], float]) -> float:
    """Sum of squares, a block at a time: all at once would take more memory than the update, or lose digits."""
    return math.fsum(
        of_block(delta[start : start + _BLOCK]) for delta in deltas.values() for start in range(0, delta.size, _BLOCK)
    )


def _rough(block: Floats) -> float:
    return float(block.dot(block))


def _exact(block: Floats) -> float:
    return float(np.square(block, dtype=np.float64).sum())


def _checked_metrics(reply: Message, config: GateConfig, metrics: Sequence[str]) -> tuple[int, dict[str, float]]:
    records = [record for record in values_of(reply.content).values() if isinstance(record, MetricRecord)]
    if len(records) != 1:
        raise Refused(f"reply has {len(records)} records of metrics, expected one")
    record = values_of(records[0])
    if len(record) > len(metrics) + 1 or set(record) != {NUM_SAMPLES, *metrics}:
        raise Refused(f"reply has the metrics {_few(list(record))}, expected {sorted({NUM_SAMPLES, *metrics})}")
    num_samples = record[NUM_SAMPLES]
    if type(num_samples) is not int:
        raise Refused(f"{NUM_SAMPLES} is {_shown(num_samples)}, expected a whole number")
    if not 1 <= num_samples <= config.max_samples:
        raise Refused(f"{NUM_SAMPLES} is {num_samples}, expected 1 to {config.max_samples}")
    values = {}
    for name in metrics:
        value = record[name]
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise Refused(f"metric {name!r} is {_shown(value)}, expected a finite number")
        values[name] = float(value)
    return num_samples, values


def _shown(value: object) -> str:
    """A number of a stranger; of anything else, which may be of any length, what it is."""
    return repr(value) if isinstance(value, float) else f"a {type(value).__name__}"


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
    return sum(_record_bytes(record) for record in values_of(message.content).values())


def _record_bytes(record: "ArrayRecord | MetricRecord | ConfigRecord") -> int:
    try:
        return record.count_bytes()
    except Exception:
        return 0

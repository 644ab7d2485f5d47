"""The client's end of the compressed uplink: a Flower mod. See ``uplink`` for both ends and the notes."""

import zlib
from collections.abc import Callable, Mapping
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from efftrain.compression import Codec, Feedback, parse_codec
from efftrain.errors import ConfigError
from efftrain.federated.flower import (
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    RecordDict,
    make_array,
    make_config,
    make_record,
    read_arrays,
    record_of,
    values_of,
    write_arrays,
)
from efftrain.federated.gate import PAYLOAD_STYPE, is_trained
from efftrain.federated.local import CONTROL

ORDER = "efftrain.uplink"
"""Name of the record that tells a client how to encode its reply."""
PARTS = "efftrain.parts"
"""Name of the record that says which parts of the model a reply is about. See Note [parts] in ``uplink``."""
RESIDUAL, STAGED, TICKET = "efftrain.residual", "efftrain.residual.staged", "efftrain.residual.ticket"
"""Names of the records in ``Context.state``: what error feedback and control variates keep, and what is on trial."""

Tensors = dict[str, npt.NDArray[np.generic]]
Order = Mapping[str, object]
Mod = Callable[[Message, Context, Callable[[Message, Context], Message]], Message]
"""A Flower mod: message, context, and what comes next."""


def uplink_mod(message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
    """Flower mod: encode the reply to a training message as the server ordered.

    A message without an order (from a server without ``UplinkGrid``, or an evaluation) passes through unchanged, so
    the mod can be part of any ``ClientApp(mods=[uplink_mod])``.

    Raises:
        NonFiniteError: Training gave inf or NaN. The client then gives an error reply, its residual stays.
        ConfigError: The reply lacks tensors of the model that was sent, or the order is malformed.
    """
    content = values_of(message.content)
    if ORDER not in content:
        records = [record for record in content.values() if isinstance(record, ArrayRecord)]
        if any(name.startswith(CONTROL) for record in records for name in record):
            raise ConfigError(
                "the message has control variates, but says nothing of which replies were taken, so a client cannot "
                "know which of its own are valid. Use the strategy scaffold on an UplinkGrid, as efftrain's driver does"
            )
        return call_next(message, context)
    order = values_of(record_of(message.content, ORDER, ConfigRecord))
    del content[ORDER]
    kept = _settle(context, order)
    sent = _with_own_controls(message, kept)
    reply = call_next(message, context)
    if not reply.has_content():
        return reply
    updates = _trained_only(_updates(sent, model_of(reply.content)), values_of(reply.content).get(PARTS))
    payloads, keep = _encode(updates, _codec(str(order["codec"])), _client_key(order, context), order, kept)
    if keep is not None:
        context.state[STAGED] = write_arrays(keep)
        context.state[TICKET] = make_config({"ticket": order["ticket"]})
    values_of(reply.content)[_name_of_model(reply.content)] = make_record(
        {name: make_array("uint8", (len(data),), PAYLOAD_STYPE, data) for name, data in payloads.items()}
    )
    return reply


@lru_cache(maxsize=16)
def _codec(text: str) -> Codec:
    """Codecs keep no state, so the clients of one process share them."""
    return parse_codec(text)


def model_of(content: RecordDict) -> Tensors:
    """The tensors of the one record of arrays in a message.

    Raises:
        ConfigError: There is none, or more than one.
    """
    return read_arrays(record_of(content, _name_of_model(content), ArrayRecord))


def _name_of_model(content: RecordDict) -> str:
    names = [name for name, record in values_of(content).items() if isinstance(record, ArrayRecord)]
    if len(names) != 1:
        raise ConfigError(f"the message has {len(names)} records of arrays, the uplink needs exactly one: the model")
    return names[0]


def pack_mask(mask: npt.NDArray[np.bool_] | None) -> bytes:
    """A mask as it travels; nothing for a whole tensor."""
    return b"" if mask is None else zlib.compress(np.packbits(mask).tobytes(), 1)


def unpack_mask(data: bytes, num_elements: int) -> npt.NDArray[np.bool_]:
    """The elements that a part is about, from the bytes of a ``PARTS`` record.

    Raises:
        ValueError: It is no mask of so many elements, or an empty one.
    """
    unpacker = zlib.decompressobj()
    num_bytes = (num_elements + 7) // 8
    try:
        bits = unpacker.decompress(data, num_bytes + 1)  # a bomb is not inflated
    except zlib.error as error:
        raise ValueError(f"mask does not inflate: {error}") from error
    if len(bits) != num_bytes or not unpacker.eof or unpacker.unused_data:
        raise ValueError(f"mask has {len(bits)} bytes or more, or no end, expected {num_bytes}")
    mask = np.unpackbits(np.frombuffer(bits, np.uint8), count=num_elements).astype(np.bool_)
    if not mask.any():
        raise ValueError("mask has no element")
    return mask


def _updates(sent: Tensors, trained: Tensors) -> dict[str, npt.NDArray[np.float32]]:
    """Trained minus sent, flat, for the tensors that travel."""
    if set(sent) != set(trained):
        raise ConfigError(f"the client replied with the tensors {sorted(trained)}, it was sent {sorted(sent)}")
    updates = {}
    for name, before in sent.items():
        if is_trained(before):
            after = trained[name]
            if after.shape != before.shape:
                raise ConfigError(f"tensor {name!r} came back with shape {after.shape}, it was sent as {before.shape}")
            updates[name] = np.subtract(after, before).astype(np.float32, copy=False).reshape(-1)
    return updates


def _trained_only(updates: dict[str, npt.NDArray[np.float32]], parts: object) -> dict[str, npt.NDArray[np.float32]]:
    """Of each update what the reply's parts name; everything without such a record. See Note [parts]."""
    if parts is None:
        return updates
    if not isinstance(parts, ConfigRecord) or not set(parts) <= set(updates):
        raise ConfigError(f"the reply's {PARTS} record must name trained tensors; the model has {sorted(updates)}")
    chosen = {}
    for name, packed in parts.items():
        if not isinstance(packed, bytes):
            raise ConfigError(f"the mask of {name!r} is a {type(packed).__name__}, expected bytes")
        chosen[name] = updates[name][unpack_mask(packed, updates[name].size)] if packed else updates[name]
    return chosen


def _client_key(order: Order, context: Context) -> int:
    """A key of this client: with one for all, their stochastic rounding errors would add up instead of averaging out.
    By partition where there is one, so that it does not depend on the node ids that a deployment draws."""
    client = context.node_config.get("partition-id", context.node_id)
    return zlib.crc32(f"{order['key']!r}/{client}".encode())


def _key(key: int, name: str) -> int:
    return zlib.crc32(f"{key}/{name}".encode())


def _settle(context: Context, order: Order) -> Tensors:
    """What this client keeps, after what it staged became valid or was dropped. See Note [feedback over rounds]."""
    state = values_of(context.state)
    if STAGED in state:
        if record_of(context.state, TICKET, ConfigRecord)["ticket"] == order["taken"]:
            state[RESIDUAL] = record_of(context.state, STAGED, ArrayRecord)
        del state[STAGED]
    return read_arrays(record_of(context.state, RESIDUAL, ArrayRecord)) if RESIDUAL in state else {}


def _with_own_controls(message: Message, kept: Tensors) -> Tensors:
    """The tensors that the reply's are measured against. Where the message has control variates, these are the client's
    own, and the app finds the difference in their place. See Note [control variates] in ``local``."""
    sent = model_of(message.content)
    controls = [name for name in sent if name.startswith(CONTROL)]
    if not controls:
        return sent
    own = {
        name: kept[name].reshape(sent[name].shape) if name in kept else np.zeros_like(sent[name]) for name in controls
    }
    corrections = {name: np.subtract(sent[name], own[name]) for name in controls}
    values_of(message.content)[_name_of_model(message.content)] = write_arrays({**sent, **corrections})
    return {**sent, **own}


def _encode(
    updates: dict[str, npt.NDArray[np.float32]], codec: Codec, key: int, order: Order, kept: Tensors
) -> tuple[dict[str, bytes], Tensors | None]:
    """Payloads; and what to keep should the server take them, None if nothing is kept at all."""
    feedback = Feedback(codec) if order["feedback"] else None
    if feedback is not None:
        # A client that now trains other parts owes nothing of those that it no longer trains.
        sizes = {name: flat.size for name, flat in updates.items()}
        owed = {name: tensor for name, tensor in kept.items() if not name.startswith(CONTROL)}
        fitting = {name: r for name, r in owed.items() if sizes.get(name.partition("/")[2]) == r.size}
        feedback.load_state_dict({name: np.asarray(residual, np.float32) for name, residual in fitting.items()})
    payloads: dict[str, bytes] = {}
    controls: Tensors = {}
    for name, flat in updates.items():
        if name.startswith(CONTROL):
            payload = codec.encode(flat, key=_key(key, name))
            controls[name] = np.add(kept[name], codec.decode(payload)) if name in kept else codec.decode(payload)
        elif feedback is not None:
            payload = feedback.encode(name, flat, key=_key(key, name))
        else:
            payload = codec.encode(flat, key=_key(key, name))
        payloads[name] = bytes(payload)
    if feedback is not None:
        feedback.commit()
    keep = controls if feedback is None else {**feedback.state_dict(), **controls}
    return payloads, keep if controls or feedback is not None else None

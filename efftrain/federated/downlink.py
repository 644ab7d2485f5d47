"""Compressed downlinks: the server sends every model through a codec, a Flower mod on the client decodes it.

The server's own model stays as it is: a client trains from what it could decode, and the update that it sends back is
added to the model that was encoded. So what the codec leaves out does not add up over the rounds, and needs no memory
on either side.

Wire: the data of each floating-point array in a message are a payload of ``efftrain.compression``, which names its
codec; type and shape are those of the tensor. Counters travel as they are.
"""

import math
import zlib
from collections.abc import Callable

import numpy as np

from efftrain.compression import Codec, Identity, decode
from efftrain.errors import PayloadError
from efftrain.federated.flower import (
    Array,
    ArrayRecord,
    Context,
    Message,
    RecordDict,
    copy_records,
    make_array,
    make_record,
    read_array,
    values_of,
    write_array,
)
from efftrain.federated.gate import PAYLOAD_STYPE, is_trained


class ModelEncoder:
    """Encodes the models of a run for its clients.

    Args:
        codec: Of every floating-point tensor; ``Identity()`` leaves messages as they are.
        seed: Of stochastic rounding.
    """

    def __init__(self, codec: Codec, seed: int = 0) -> None:
        self._codec, self._seed = codec, seed
        self._last: tuple[ArrayRecord, int, ArrayRecord] | None = None

    def encode(self, content: RecordDict, server_round: int) -> RecordDict:
        """The content as clients get it; every client of a round gets the same bytes.

        Args:
            content: Of one message. Not changed.
            server_round: Keys the rounding, so that a resumed run sends what it sent before.
        """
        if isinstance(self._codec, Identity):
            return content
        encoded = copy_records(content)
        for name, record in content.items():
            if isinstance(record, ArrayRecord):
                encoded[name] = self._encoded(record, server_round)
        return encoded

    def _encoded(self, record: ArrayRecord, server_round: int) -> ArrayRecord:
        # Buffered runs send one model many times, a few clients at a time.
        if self._last is None or self._last[0] is not record or self._last[1] != server_round:
            arrays = {name: self._array(name, array, server_round) for name, array in record.items()}
            self._last = record, server_round, make_record(arrays)
        return self._last[2]

    def _array(self, name: str, array: Array, server_round: int) -> Array:
        tensor = read_array(array)
        if not is_trained(tensor):
            return array
        key = zlib.crc32(f"{self._seed}/downlink/{server_round}/{name}".encode())
        payload = self._codec.encode(np.asarray(tensor, np.float32).reshape(-1), key=key)
        return make_array(tensor.dtype.name, tensor.shape, PAYLOAD_STYPE, bytes(payload))


def downlink_mod(message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
    """Flower mod: decode the model of a message, whatever the message is for.

    Arrays that are no payloads pass through unchanged, so the mod can be part of any ``ClientApp``. It comes before
    ``uplink_mod``: ``ClientApp(mods=[downlink_mod, uplink_mod])``.

    Raises:
        PayloadError: An array does not decode to the shape that it announces.
    """
    content = values_of(message.content)
    for key, record in content.items():
        if isinstance(record, ArrayRecord):
            arrays = values_of(record)
            if any(array.stype == PAYLOAD_STYPE for array in arrays.values()):
                content[key] = make_record({name: _decoded(name, array) for name, array in arrays.items()})
    return call_next(message, context)


def _decoded(name: str, array: Array) -> Array:
    if array.stype != PAYLOAD_STYPE:
        return array
    shape = tuple(array.shape)
    flat = decode(array.data, max_elements=math.prod(shape))
    if flat.size != math.prod(shape):
        raise PayloadError(f"tensor {name!r} of the model has {flat.size} elements, expected those of {shape}")
    return write_array(flat.astype(array.dtype, copy=False).reshape(shape))

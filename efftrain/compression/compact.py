"""Payloads without their header, for wires whose two ends know codec and size: the gradient exchange.

A slot holds the payload's checksum (4 bytes) and its body. The checksum is that of the whole payload, header included,
so bytes of another codec or size are refused as they are by ``Codec.decode``. A codec of varying size has 4 bytes more
in front of them, the length of its body, and a slot with room for the largest.
"""

import struct
from functools import lru_cache

import numpy as np

from efftrain.compression.codec import Codec
from efftrain.compression.entries import Entries
from efftrain.compression.sparsify import Sparse
from efftrain.compression.wire import CRC_OFFSET, HEADER, Bytes, Floats, Payload
from efftrain.errors import PayloadError

_LENGTH = struct.Struct("<I")


@lru_cache(maxsize=1 << 14)
def slot_bytes(codec: Codec, num_elements: int) -> int:
    """Bytes of a tensor's slot; 0 for an empty tensor."""
    if not num_elements:
        return 0
    body = codec.encoded_bytes(num_elements) - HEADER.size - codec.num_param_bytes
    return body + 4 + (0 if codec.fixed_size else _LENGTH.size)


def fill_slot(slot: Bytes, codec: Codec, payload: Payload) -> None:
    """Write a payload of ``codec`` to its slot, uint8, shape ``(slot_bytes,)``."""
    data, body = payload.data, codec.body_of(payload)
    first = 0
    if not codec.fixed_size:
        first = _LENGTH.size
        slot[:first] = np.frombuffer(_LENGTH.pack(body.size), np.uint8)
        slot[first + 4 + body.size :] = 0
    slot[first : first + 4] = data[CRC_OFFSET : HEADER.size]
    slot[first + 4 : first + 4 + body.size] = body


def add_slot(slot: Bytes, codec: Codec, out: Floats | Entries, weight: float = 1.0) -> None:
    """Add ``weight`` times the tensor in a slot to ``out``.

    Args:
        slot: uint8, shape ``(slot_bytes(codec, N),)``.
        codec: That wrote it; a sparse one if ``out`` is sparse.
        out: float32, shape ``(N,)``, contiguous; or ``Entries`` of that size.
        weight: Factor.

    Raises:
        PayloadError: The bytes are not what ``fill_slot`` wrote for this codec and size.
    """
    first, last = 0, slot.size
    if slot.size != slot_bytes(codec, out.size):
        raise PayloadError(f"slot has {slot.size} bytes, expected {slot_bytes(codec, out.size)}")
    if not codec.fixed_size:
        first = _LENGTH.size
        last = first + 4 + _LENGTH.unpack(slot[:first].tobytes())[0]
        if last > slot.size:
            raise PayloadError(f"slot of {slot.size} bytes announces {last} of them")
    (crc,) = struct.unpack("<I", slot[first : first + 4].tobytes())
    body = slot[first + 4 : last]
    if isinstance(out, Entries):
        assert isinstance(codec, Sparse), f"{codec} sends all elements"
        out.add(*codec.entries_of(body, crc, out.size), weight)
    else:
        codec.add_body(body, crc, out, weight)

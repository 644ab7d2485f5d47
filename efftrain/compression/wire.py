"""The payload: uint8 bytes that every wire carries, and the only place that reads or writes their header.

Layout, little endian, version 1 (``docs/formats/wire.md``)::

    offset  size  field
         0     2  magic, the bytes "EF"
         2     1  version, 1
         3     1  codec id
         4     1  dtype of the tensor: 0 = float32
         5     1  P, length of the codec's parameters
         6     8  number of elements
        14     4  CRC-32 of every byte but these four
        18     P  codec parameters
      18+P     .  body, laid out by the codec

NumPy and the standard library only: a phone or a server without torch decodes too.
"""

import struct
import zlib
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from efftrain.errors import PayloadError

MAGIC = b"EF"
VERSION = 1
FLOAT32 = 0
HEADER = struct.Struct("<2sBBBBQI")
CRC_OFFSET = 14

MAX_ELEMENTS = 1 << 28
"""Largest tensor that ``decode`` makes unless the caller says otherwise (1 GiB of fp32): a 30-byte message must not
be able to ask for all the memory of a server."""

Bytes: TypeAlias = npt.NDArray[np.uint8]
Floats: TypeAlias = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Payload:
    """One encoded tensor.

    Attributes:
        data: All bytes of the message, header included, uint8, shape ``(num_bytes,)``.
    """

    data: Bytes

    @property
    def num_bytes(self) -> int:
        """Bytes on the wire, header included."""
        return int(self.data.size)

    def __bytes__(self) -> bytes:
        return self.data.tobytes()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Payload) and bytes(self) == bytes(other)

    def __hash__(self) -> int:
        return hash(bytes(self))


class Parts(NamedTuple):
    """A payload taken apart. ``body`` is a view into the message, not a copy."""

    codec_id: int
    params: bytes
    num_elements: int
    body: Bytes


def pack(codec_id: int, params: bytes, num_elements: int, body: list[Bytes]) -> Payload:
    """Join header, parameters and the pieces of a body into one message."""
    data, room = start(codec_id, params, num_elements, sum(piece.size for piece in body))
    first = 0
    for piece in body:
        room[first : first + piece.size] = piece
        first += piece.size
    return seal(data)


def start(codec_id: int, params: bytes, num_elements: int, num_body_bytes: int) -> tuple[Bytes, Bytes]:
    """Begin a message: all of it, and the view of its body, to be filled in place before ``seal``."""
    if len(params) > 255:
        raise ValueError(f"codec parameters take {len(params)} bytes, the header has room for 255")
    size = HEADER.size + len(params)
    data = np.empty(size + num_body_bytes, np.uint8)
    data.data[:size] = _head(codec_id, params, num_elements)
    return data, data[size:]


def seal(data: Bytes) -> Payload:
    """Write the checksum of a message that is complete."""
    struct.pack_into("<I", data.data, CRC_OFFSET, _checksum(data))
    return Payload(data)


def unpack(message: "Payload | Any", *, max_elements: int = MAX_ELEMENTS) -> Parts:
    """Check a message and take it apart.

    Args:
        message: A ``Payload`` or any bytes-like object from a wire.
        max_elements: Refuse tensors larger than this.

    Raises:
        PayloadError: Wrong magic, version, dtype, length or checksum, or more elements than allowed.
    """
    data = as_bytes(message)
    if data.size < HEADER.size:
        raise PayloadError(f"payload of {data.size} bytes is shorter than its {HEADER.size}-byte header")
    magic, version, codec_id, dtype, num_params, num_elements, crc = HEADER.unpack_from(data.data)
    if magic != MAGIC:
        raise PayloadError(
            f"payload starts with {magic!r}, expected {MAGIC!r}: these bytes are not an efftrain payload"
        )
    if version != VERSION:
        raise PayloadError(f"payload has format version {version}, this efftrain reads version {VERSION}")
    if crc != _checksum(data):
        raise PayloadError("payload checksum does not match: the bytes were changed or cut on their way")
    if dtype != FLOAT32:
        raise PayloadError(f"payload dtype code {dtype} is unknown, expected {FLOAT32} (float32)")
    if num_elements > max_elements:
        raise PayloadError(f"payload announces {num_elements} elements, at most {max_elements} are accepted here")
    start = HEADER.size + num_params
    if data.size < start:
        raise PayloadError(f"payload of {data.size} bytes ends inside its {num_params}-byte codec parameters")
    return Parts(codec_id, data[HEADER.size : start].tobytes(), num_elements, data[start:])


def as_bytes(message: "Payload | Any") -> Bytes:
    """View a payload, bytes, bytearray, memoryview or uint8 array as a flat uint8 array, without a copy."""
    if isinstance(message, Payload):
        return message.data
    if isinstance(message, np.ndarray):
        if message.dtype != np.uint8 or message.ndim != 1:
            raise PayloadError(f"payload array is {message.dtype} {message.shape}, expected flat uint8")
        return message
    try:
        return np.frombuffer(message, np.uint8)
    except (TypeError, ValueError, BufferError) as error:
        raise PayloadError(f"payload is a {type(message).__name__}, expected bytes") from error


def checksum_of(codec_id: int, params: bytes, num_elements: int, body: Bytes) -> int:
    """The checksum in the header of the message that has these parts."""
    head = _head(codec_id, params, num_elements)
    return zlib.crc32(body.data, zlib.crc32(head[HEADER.size :], zlib.crc32(head[:CRC_OFFSET])))


def _head(codec_id: int, params: bytes, num_elements: int) -> bytes:
    return HEADER.pack(MAGIC, VERSION, codec_id, FLOAT32, len(params), num_elements, 0) + params


def _checksum(data: Bytes) -> int:
    view = data.data
    return zlib.crc32(view[HEADER.size :], zlib.crc32(view[:CRC_OFFSET]))

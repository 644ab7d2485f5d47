"""The entropy stage: what another codec wrote, deflated."""

import zlib
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from efftrain.compression.codec import Codec, Combine
from efftrain.compression.lowrank import LowRank
from efftrain.compression.quantize import Identity
from efftrain.compression.sparsify import DENSE, RandomK, Threshold, TopK
from efftrain.compression.wire import HEADER, Bytes, Floats, Payload, pack
from efftrain.errors import PayloadError

INSIDE: tuple[type[Codec], ...] = (*DENSE, TopK, RandomK, Threshold, LowRank)
"""Codecs whose bytes may be deflated: all others."""
_BY_ID = {codec.codec_id: codec for codec in INSIDE}

_PLAIN, _DEFLATED = 0, 1
_RAW = -15
"""zlib's name for a DEFLATE stream without header and checksum: the payload has its own."""


@dataclass(frozen=True)
class Deflate(Codec):
    """Another codec's bytes through DEFLATE, losslessly; ``Int8(block=64) >> Deflate()`` makes it.

    Quantized gradients are far from even: units that are off have gradients of 0, most others use few of the levels.
    On a small convolutional network a third of ``Int8``'s bytes and half of ``IntN(2)``'s go; of sparse codecs, whose
    bits are nearly random, next to none (``docs/codecs.md``). A body that would not get shorter is sent as it is, with
    one byte more.

    For wires whose messages may vary in size, such as a federated uplink. Ranks send each other slots of the largest
    size, where nothing would be saved: ``Plan`` refuses it.

    Args:
        level: 1 (fast) to 9 (small), as zlib has them. zlib takes 15 to 40 ns a byte to write (9: 200) and 5 to read,
            more than our kernels take to encode: worth it below some 100 Mbit/s.
        codec: Writes what is deflated. ``>>`` sets it.

    Source: RFC 1951. Differs from QSGD (Alistarh et al., arXiv:1610.02132, section 3.2): Huffman codes of repeated
        strings in place of Elias codes of single levels, since every platform has a reader.
    """

    level: int = 1
    codec: Codec = field(default_factory=Identity)

    codec_id: ClassVar[int] = 13
    combine: ClassVar[Combine] = "gather"
    fixed_size: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if type(self.level) is not int or not 1 <= self.level <= 9:
            raise ValueError(f"Deflate level is {self.level!r}, expected 1 to 9")
        if type(self.codec) not in INSIDE:
            raise ValueError(f"Deflate follows a codec that is no Deflate itself, not {self.codec!r}")

    def __rrshift__(self, codec: Codec) -> "Deflate":
        """``Int8() >> Deflate()``, ``TopK(0.01) >> Int8() >> Deflate()``."""
        return replace(self, codec=codec)

    def encoded_bytes(self, num_elements: int) -> int:
        """The largest size: one byte more than without, and the parameters."""
        return HEADER.size + self.num_param_bytes + 1 + self._plain_bytes(num_elements)

    def for_tensor(self, shape: tuple[int, ...]) -> "Deflate":
        """The inner codec fitted to the tensor."""
        return replace(self, codec=self.codec.for_tensor(shape))

    def warmed_up(self, progress: float) -> "Deflate":
        """The inner codec's."""
        return replace(self, codec=self.codec.warmed_up(progress))

    def _plain_bytes(self, num_elements: int) -> int:
        return self.codec.encoded_bytes(num_elements) - HEADER.size - self.codec.num_param_bytes

    def _params(self) -> bytes:
        return bytes([self.level, self.codec.codec_id]) + self.codec.params

    @classmethod
    def _from_params(cls, params: bytes) -> "Deflate":
        if len(params) < 2 or not 1 <= params[0] <= 9 or params[1] not in _BY_ID:
            raise PayloadError(f"Deflate parameters are {params.hex()}, expected a level of 1 to 9 and another codec")
        return cls(params[0], _BY_ID[params[1]]._from_params(params[2:]))

    def _encode_body(self, values: Floats, key: int) -> list[Bytes]:
        return self._deflated(np.concatenate([np.empty(0, np.uint8), *self.codec._encode_body(values, key)]))

    def _encode_fused(self, values: Floats, residual: Floats | None, key: int, left: Floats | None) -> Payload | None:
        if left is None:
            inner = self.codec.encode(values, key=key)
        else:
            inner, _ = self.codec.encode_with_residual(values, residual, key=key, out=left)
        return pack(self.codec_id, self.params, values.size, self._deflated(self.codec.body_of(inner)))

    def _deflated(self, plain: Bytes) -> list[Bytes]:
        stream = zlib.compressobj(self.level, zlib.DEFLATED, _RAW)
        short = stream.compress(plain.data) + stream.flush()
        kind, body = (_DEFLATED, np.frombuffer(short, np.uint8)) if len(short) < plain.size else (_PLAIN, plain)
        return [np.array([kind], np.uint8), body]

    def _decode_body(self, body: Bytes, num_elements: int) -> Floats:
        return self.codec._decode_body(self._inflated(body, num_elements), num_elements)

    def _add_body(self, body: Bytes, out: Floats, weight: np.float32) -> None:
        self.codec._add_body(self._inflated(body, out.size), out, weight)

    def _inflated(self, body: Bytes, num_elements: int) -> Bytes:
        if not body.size or body[0] > _DEFLATED:
            raise PayloadError(f"Deflate body begins with {body[:1].tobytes().hex() or 'nothing'}, expected 00 or 01")
        if body[0] == _PLAIN:
            return np.ascontiguousarray(body[1:])
        most = self._plain_bytes(num_elements)
        stream = zlib.decompressobj(_RAW)
        try:
            # A few bytes can announce gigabytes: no more is made than the codec can have written.
            plain = stream.decompress(body[1:].tobytes(), most + 1)
        except zlib.error as error:
            raise PayloadError(f"Deflate body is no DEFLATE stream: {error}") from error
        if len(plain) > most or not stream.eof or stream.unused_data:
            raise PayloadError(f"Deflate body does not hold one stream of at most {most} bytes, as {self.codec} writes")
        return np.frombuffer(plain, np.uint8)

"""Dense codecs that send integers: every element, with fewer bits."""

import struct
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import numpy as np

from efftrain.compression import kernels
from efftrain.compression.blocks import (
    Levels,
    check_block,
    dequantize,
    dequantize_add,
    expect_body,
    expect_finite,
    largest_scale,
    num_blocks,
    pack_codes,
    packed_bytes,
    quantize,
    scale_bytes,
    unpack_codes,
)
from efftrain.compression.codec import Codec, Combine, add
from efftrain.compression.wire import HEADER, Bytes, Floats, Payload, seal, start
from efftrain.errors import PayloadError


@dataclass(frozen=True)
class Identity(Codec):
    """All values as they are, 4 bytes an element. The control of every experiment, exact to the bit."""

    codec_id: ClassVar[int] = 1
    combine: ClassVar[Combine] = "sum"

    def encoded_bytes(self, num_elements: int) -> int:
        """Header plus 4 bytes an element."""
        return HEADER.size + 4 * num_elements

    def _params(self) -> bytes:
        return b""

    @classmethod
    def _from_params(cls, params: bytes) -> "Identity":
        if params:
            raise PayloadError(f"Identity takes no parameters, the payload has {len(params)} bytes of them")
        return cls()

    def _encode_body(self, values: Floats, key: int) -> list[Bytes]:
        return [values.astype("<f4", copy=False).view(np.uint8)]

    def _encode_fused(self, values: Floats, residual: Floats | None, key: int, left: Floats | None) -> Payload | None:
        if left is None:
            return None
        payload = self.encode(add(values, residual, out=left))
        left.fill(0)
        return payload

    def _decode_body(self, body: Bytes, num_elements: int) -> Floats:
        expect_body("Identity", body, 4 * num_elements)
        return expect_finite("Identity", body.view("<f4").astype(np.float32))


@dataclass(frozen=True)
class Int8(Codec):
    """8-bit integers with one scale a block: ``q = round(x / s)``, ``s = max|x| / 127`` over the block.

    The error of an element is at most ``s / 2`` (nearest) or ``s`` (stochastic). It fails where one outlier a block
    drowns its neighbors: use a smaller block, or ``TopK`` first.

    Args:
        block: Elements that share a scale, 1 to 65535. A smaller block is more exact and costs ``4 / block`` bytes an
            element more.
        rounding: ``nearest`` (half to even; with ``Feedback`` nothing is lost) or ``stochastic`` (unbiased without
            feedback; more noise).

    Source: block-wise scaling as in QSGD's bucketed form (Alistarh et al., arXiv:1610.02132, section 4), with the
        maximum norm. Differs: 255 symmetric levels and nearest rounding by default, since feedback removes the bias.
    """

    block: int = 256
    rounding: Literal["nearest", "stochastic"] = "nearest"

    codec_id: ClassVar[int] = 2
    combine: ClassVar[Combine] = "two_phase"

    def __post_init__(self) -> None:
        check_block("Int8", self.block)
        _check_rounding("Int8", self.rounding)

    def encoded_bytes(self, num_elements: int) -> int:
        """Header, one byte an element, four a block."""
        return HEADER.size + 3 + num_elements + 4 * num_blocks(num_elements, self.block)

    def _params(self) -> bytes:
        return struct.pack("<HB", self.block, self.rounding == "stochastic")

    @classmethod
    def _from_params(cls, params: bytes) -> "Int8":
        if len(params) != 3 or params[2] > 1 or params[:2] == b"\0\0":
            raise PayloadError(
                f"Int8 parameters are {params.hex()}, expected a block of 1 to 65535 and a rounding of 0 or 1"
            )
        block, stochastic = struct.unpack("<HB", params)
        return cls(block, "stochastic" if stochastic else "nearest")

    def _encode_body(self, values: Floats, key: int) -> list[Bytes]:
        scales, q = quantize(values, self.block, 127, _noise(self.rounding, key))
        return [scale_bytes(scales), q.view(np.uint8)]

    def _encode_fused(self, values: Floats, residual: Floats | None, key: int, left: Floats | None) -> Payload | None:
        if self.rounding == "stochastic":
            return None
        split = 4 * num_blocks(values.size, self.block)
        data, body = start(self.codec_id, self.params, values.size, split + values.size)
        limit = largest_scale(127)
        done = kernels.quantize(values, residual, self.block, 127, limit, body[:split], body[split:], left)
        return None if done is kernels.MISSING else seal(data)

    def _decode_body(self, body: Bytes, num_elements: int) -> Floats:
        return dequantize("Int8", *self._split(body, num_elements), self.block, 127)

    def _add_body(self, body: Bytes, out: Floats, weight: np.float32) -> None:
        dequantize_add("Int8", *self._split(body, out.size), self.block, 127, weight, out)

    def _split(self, body: Bytes, num_elements: int) -> tuple[Bytes, Levels]:
        split = 4 * num_blocks(num_elements, self.block)
        expect_body("Int8", body, num_elements + split)
        return body[:split], body[split:].view(np.int8)


@dataclass(frozen=True)
class IntN(Codec):
    """Integers of 4 or 2 bits with one scale a block: ``q = round(x / s)``, ``s = max|x| / (2**(bits - 1) - 1)``.

    4 bits have the levels -7 to 7, 2 bits -1 to 1: there, nearest rounding sends only what is above half the block's
    largest magnitude. Meant for ``Feedback``, or for the values of a sparse codec, which lie closer together. It fails
    as ``Int8`` does, sooner: an outlier 14 times its neighbors silences them.

    Args:
        bits: 4 (half a byte an element) or 2 (a quarter).
        block: Elements that share a scale, 1 to 65535. A smaller block is more exact and costs ``4 / block`` bytes an
            element more.
        rounding: As for ``Int8``. Without ``Feedback``, stochastic rounding is the one that converges.

    Source: as ``Int8``; the levels are those of QSGD (Alistarh et al., arXiv:1610.02132, section 3.1) with
        ``s = 7`` or ``1``. Differs: fixed width in place of Elias coding, so that the size is known before.
    """

    bits: Literal[4, 2] = 4
    block: int = 128
    rounding: Literal["nearest", "stochastic"] = "nearest"

    codec_id: ClassVar[int] = 5
    combine: ClassVar[Combine] = "two_phase"

    def __post_init__(self) -> None:
        if isinstance(self.bits, (bool, float)) or self.bits not in (2, 4):
            raise ValueError(f"IntN bits is {self.bits!r}, expected 4 or 2")
        check_block("IntN", self.block)
        _check_rounding("IntN", self.rounding)

    @property
    def _levels(self) -> int:
        return (1 << (self.bits - 1)) - 1

    def encoded_bytes(self, num_elements: int) -> int:
        """Header, ``bits / 8`` bytes an element, four a block."""
        scales = 4 * num_blocks(num_elements, self.block)
        return HEADER.size + 4 + scales + packed_bytes(num_elements, self.bits)

    def _params(self) -> bytes:
        return struct.pack("<BHB", self.bits, self.block, self.rounding == "stochastic")

    @classmethod
    def _from_params(cls, params: bytes) -> "IntN":
        if len(params) != 4 or params[0] not in (2, 4) or params[1:3] == b"\0\0" or params[3] > 1:
            raise PayloadError(
                f"IntN parameters are {params.hex()}, expected 4 or 2 bits, a block of 1 to 65535, a rounding of 0 or 1"
            )
        bits, block, stochastic = struct.unpack("<BHB", params)
        return cls(cast(Literal[4, 2], bits), block, "stochastic" if stochastic else "nearest")

    def _encode_body(self, values: Floats, key: int) -> list[Bytes]:
        scales, q = quantize(values, self.block, self._levels, _noise(self.rounding, key))
        return [scale_bytes(scales), pack_codes(q.view(np.uint8), self.bits)]

    def _encode_fused(self, values: Floats, residual: Floats | None, key: int, left: Floats | None) -> Payload | None:
        if self.rounding == "stochastic":
            return None
        split = 4 * num_blocks(values.size, self.block)
        q, levels = np.empty(values.size, np.uint8), self._levels
        num_body_bytes = split + packed_bytes(values.size, self.bits)
        data, body = start(self.codec_id, self.params, values.size, num_body_bytes)
        limit = largest_scale(levels)
        if kernels.quantize(values, residual, self.block, levels, limit, body[:split], q, left) is kernels.MISSING:
            return None
        body[split:] = pack_codes(q, self.bits)
        return seal(data)

    def _decode_body(self, body: Bytes, num_elements: int) -> Floats:
        return dequantize("IntN", *self._split(body, num_elements), self.block, self._levels)

    def _add_body(self, body: Bytes, out: Floats, weight: np.float32) -> None:
        dequantize_add("IntN", *self._split(body, out.size), self.block, self._levels, weight, out)

    def _split(self, body: Bytes, num_elements: int) -> tuple[Bytes, Levels]:
        split = 4 * num_blocks(num_elements, self.block)
        expect_body("IntN", body, split + packed_bytes(num_elements, self.bits))
        codes = unpack_codes("IntN", body[split:], num_elements, self.bits)
        # Two's complement of few bits, widened.
        sign = np.uint8(1 << (self.bits - 1))
        return body[:split], ((codes ^ sign) - sign).view(np.int8)


def _check_rounding(codec: str, rounding: object) -> None:
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"{codec} rounding is {rounding!r}, expected 'nearest' or 'stochastic'")


def _noise(rounding: str, key: int) -> np.random.Generator | None:
    return np.random.default_rng(key) if rounding == "stochastic" else None

"""Dense codecs that send small floats: every element, with fewer bits of mantissa and exponent."""

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Literal, cast, get_args

import numpy as np

from efftrain.compression import kernels
from efftrain.compression.blocks import (
    check_block,
    expect_body,
    expect_finite,
    expect_no_more_bits,
    in_blocks,
    largest_scale,
    num_blocks,
    pack_codes,
    packed_bytes,
    per_element,
    read_scales,
    scale_bytes,
    scaled,
    unpack_codes,
)
from efftrain.compression.codec import Codec, Combine
from efftrain.compression.wire import HEADER, Bytes, Floats, Payload, seal, start
from efftrain.errors import PayloadError

HalfFormat = Literal["fp16", "bf16"]
Fp8Format = Literal["e4m3", "e5m2"]
MxFormat = Literal["e4m3", "e5m2", "e3m2", "e2m3", "e2m1", "int8"]

_LARGEST_FP16 = np.float32(65504)
_LARGEST_BF16 = 0x7F7F


@dataclass(frozen=True)
class Half(Codec):
    """16-bit floats, rounded to nearest, half to even; 2 bytes an element, no knob but the format.

    ``fp16`` has 11 significant bits between 6e-8 and 65504; what is larger is sent as 65504, what is smaller as 0.
    ``bf16`` has 8 significant bits and the range of fp32. It fails where half the bytes are still too many.

    Args:
        format: ``fp16`` for gradients of normal size, ``bf16`` where the range is unknown.

    Source: IEEE 754-2019 binary16; bfloat16 as in Kalamkar et al. (arXiv:1905.12322). Differs: numbers beyond the
        range become the largest one, since infinity would end the training.
    """

    format: HalfFormat = "fp16"

    codec_id: ClassVar[int] = 4
    combine: ClassVar[Combine] = "two_phase"

    def __post_init__(self) -> None:
        _check_format("Half", self.format, get_args(HalfFormat))

    def encoded_bytes(self, num_elements: int) -> int:
        """Header plus 2 bytes an element."""
        return HEADER.size + 1 + 2 * num_elements

    def _params(self) -> bytes:
        return bytes([get_args(HalfFormat).index(self.format)])

    @classmethod
    def _from_params(cls, params: bytes) -> "Half":
        if len(params) != 1:
            raise PayloadError(f"Half parameters are {params.hex()}, expected a format of 0 or 1")
        return cls(cast(HalfFormat, _format("Half", params[0], get_args(HalfFormat))))

    def _encode_body(self, values: Floats, key: int) -> list[Bytes]:
        if self.format == "fp16":
            return [np.clip(values, -_LARGEST_FP16, _LARGEST_FP16).astype("<f2").view(np.uint8)]
        codes = np.empty(values.size, "<u2")
        for part in _parts(values.size):
            bits = values[part].view(np.uint32)
            sign, magnitude = bits >> 16 & 0x8000, bits & 0x7FFFFFFF
            # Carries what is above the middle, and the middle itself if the last bit that stays is odd.
            rounded = (magnitude + 0x7FFF + (magnitude >> 16 & 1)) >> 16
            codes[part] = sign | np.minimum(rounded, _LARGEST_BF16)
        return [codes.view(np.uint8)]

    def _encode_fused(self, values: Floats, residual: Floats | None, key: int, left: Floats | None) -> Payload | None:
        data, body = start(self.codec_id, self.params, values.size, 2 * values.size)
        done = kernels.half_encode(values, residual, self.format == "bf16", body, left)
        return None if done is kernels.MISSING else seal(data)

    def _add_body(self, body: Bytes, out: Floats, weight: np.float32) -> None:
        expect_body("Half", body, 2 * out.size)
        if kernels.half_decode_add(body, self.format == "bf16", float(weight), out) is kernels.MISSING:
            super()._add_body(body, out, weight)

    def _decode_body(self, body: Bytes, num_elements: int) -> Floats:
        expect_body("Half", body, 2 * num_elements)
        done = kernels.half_decode(body, self.format == "bf16")
        if done is not kernels.MISSING:
            return done
        if self.format == "fp16":
            return expect_finite("Half", body.view("<f2").astype(np.float32))
        return expect_finite("Half", (body.view("<u2").astype(np.uint32) << 16).view(np.float32))


@dataclass(frozen=True)
class Fp8(Codec):
    """8-bit floats with one fp32 scale a block: ``fp8(x / s)``, ``s = max|x| / largest``, rounded half to even.

    Against ``Int8`` at the same size: an element's error is relative to itself (at most 1/16 for ``e4m3``, 1/8 for
    ``e5m2``) over many orders of magnitude, but 9 (``e4m3``) to 18 times larger next to the block's maximum. Better
    where a block mixes large and small entries that all matter, worse otherwise.

    Args:
        format: ``e4m3`` (largest 448, smallest 2^-9) or ``e5m2`` (largest 57344, smallest 2^-16).
        block: Elements that share a scale, 1 to 65535; ``4 / block`` bytes an element more. It matters less than for
            ``Int8``.

    Source: Micikevicius et al., FP8 Formats for Deep Learning (arXiv:2209.05433), table 1. Differs: a scale a block,
        and saturation, so that infinity and NaN are never sent.
    """

    format: Fp8Format = "e4m3"
    block: int = 256

    codec_id: ClassVar[int] = 8
    combine: ClassVar[Combine] = "two_phase"

    def __post_init__(self) -> None:
        _check_format("Fp8", self.format, get_args(Fp8Format))
        check_block("Fp8", self.block)

    def encoded_bytes(self, num_elements: int) -> int:
        """Header, one byte an element, four a block."""
        return HEADER.size + 3 + num_elements + 4 * num_blocks(num_elements, self.block)

    def _params(self) -> bytes:
        return struct.pack("<BH", get_args(Fp8Format).index(self.format), self.block)

    @classmethod
    def _from_params(cls, params: bytes) -> "Fp8":
        if len(params) != 3 or params[1:] == b"\0\0":
            raise PayloadError(f"Fp8 parameters are {params.hex()}, expected a format and a block of 1 to 65535")
        number, block = struct.unpack("<BH", params)
        return cls(cast(Fp8Format, _format("Fp8", number, get_args(Fp8Format))), block)

    def _encode_body(self, values: Floats, key: int) -> list[Bytes]:
        small = _MINIFLOATS[self.format]
        ratio, scales = scaled(in_blocks(values, self.block), int(small.largest))
        return [scale_bytes(scales), small.codes(ratio.reshape(-1)[: values.size])]

    def _encode_fused(self, values: Floats, residual: Floats | None, key: int, left: Floats | None) -> Payload | None:
        small, split = _MINIFLOATS[self.format], 4 * num_blocks(values.size, self.block)
        data, body = start(self.codec_id, self.params, values.size, split + values.size)
        number = small.for_kernels(float(largest_scale(int(small.largest))))
        scales = kernels.encode_minifloats(values, residual, self.block, number, body[split:], left)
        if scales is kernels.MISSING:
            return None
        body[:split] = scale_bytes(scales)
        return seal(data)

    def _add_body(self, body: Bytes, out: Floats, weight: np.float32) -> None:
        if self._look_up(body, out, float(weight)) is kernels.MISSING:
            super()._add_body(body, out, weight)

    def _look_up(self, body: Bytes, out: Floats, weight: float | None) -> kernels.Missing | None:
        scales, table = self._scales(body, out.size), _MINIFLOATS[self.format].values()
        return kernels.look_up("Fp8", body[4 * scales.size :], 8, table, scales, self.block, weight, out)

    def _scales(self, body: Bytes, num_elements: int) -> Floats:
        split = 4 * num_blocks(num_elements, self.block)
        expect_body("Fp8", body, num_elements + split)
        return read_scales("Fp8", body[:split], int(_MINIFLOATS[self.format].largest))

    def _decode_body(self, body: Bytes, num_elements: int) -> Floats:
        out = np.empty(num_elements, np.float32)
        if self._look_up(body, out, None) is not kernels.MISSING:
            return out
        small, scales = _MINIFLOATS[self.format], self._scales(body, num_elements)
        split = 4 * scales.size
        return expect_finite("Fp8", small.values()[body[split:]] * per_element(scales, self.block, num_elements))


@dataclass(frozen=True)
class Mx(Codec):
    """OCP microscaling: blocks of 32 elements of 4, 6 or 8 bits that share a power of two, one byte a block.

    ``2^(floor(log2 max|x|) - emax)`` is the scale, and ``x / scale`` is rounded half to even to the element's format;
    what exceeds its largest number becomes that. What a GPU with microscaling units reads as it is. Scales cost 1/32
    byte an element, an eighth of fp32 scales at the same block; being powers of two they waste up to one bit of range.

    Args:
        format: ``e4m3``, ``e5m2`` (8 bits), ``e3m2``, ``e2m3`` (6 bits), ``e2m1`` (4 bits: 0, 0.5, 1, 1.5, 2, 3, 4, 6)
            or ``int8``. Error next to the block's maximum, at most: 1/8, 1/8, 1/8, 1/16, 1/4 and 1/128 of it.

    Source: Open Compute Project, Microscaling Formats (MX) Specification 1.0, sections 5 and 6; Rouhani et al.
        (arXiv:2310.10537), algorithm 1. Differs: never a NaN scale, since inf and NaN are refused before; int8 has
        no -128.
    """

    format: MxFormat = "e4m3"

    codec_id: ClassVar[int] = 9
    combine: ClassVar[Combine] = "two_phase"

    def __post_init__(self) -> None:
        _check_format("Mx", self.format, get_args(MxFormat))

    @property
    def _bits(self) -> int:
        return 8 if self.format == "int8" else _MINIFLOATS[self.format].bits

    def encoded_bytes(self, num_elements: int) -> int:
        """Header, the bits of each element, one byte a block of 32."""
        scales = num_blocks(num_elements, _MX_BLOCK)
        return HEADER.size + 1 + scales + packed_bytes(num_elements, self._bits)

    def _params(self) -> bytes:
        return bytes([get_args(MxFormat).index(self.format)])

    @classmethod
    def _from_params(cls, params: bytes) -> "Mx":
        if len(params) != 1:
            raise PayloadError(f"Mx parameters are {params.hex()}, expected a format of 0 to 5")
        return cls(cast(MxFormat, _format("Mx", params[0], get_args(MxFormat))))

    def _encode_body(self, values: Floats, key: int) -> list[Bytes]:
        padded = in_blocks(values, _MX_BLOCK)
        largest = np.abs(padded).max(axis=1, initial=0)
        emax = 0 if self.format == "int8" else int(np.log2(_MINIFLOATS[self.format].largest))
        # frexp's mantissa is in [0.5, 1), so its exponent is one more; for 0 it is 0, and the block's scale the least.
        exponents = np.where(largest > 0, np.frexp(largest)[1] - 1 - emax, -_E8M0_BIAS)
        exponents = np.maximum(exponents, -_E8M0_BIAS).astype(np.int32)
        # Exact: a power of two, and what becomes denormal is far below the smallest element.
        ratio = (padded * np.ldexp(np.float32(1), -exponents)[:, None]).reshape(-1)[: values.size]
        if self.format == "int8":
            codes = np.clip(np.rint(ratio * np.float32(64)), -127, 127).astype(np.int8).view(np.uint8)
        else:
            codes = _MINIFLOATS[self.format].codes(ratio)
        return [(exponents + _E8M0_BIAS).astype(np.uint8), pack_codes(codes, self._bits)]

    def _encode_fused(self, values: Floats, residual: Floats | None, key: int, left: Floats | None) -> Payload | None:
        split, bits = num_blocks(values.size, _MX_BLOCK), self._bits
        data, body = start(self.codec_id, self.params, values.size, split + packed_bytes(values.size, bits))
        codes = body[split:] if bits == 8 else np.empty(values.size, np.uint8)
        number = _INT8_FOR_KERNELS if self.format == "int8" else _MINIFLOATS[self.format].for_kernels(0.0)
        scales = kernels.encode_minifloats(values, residual, _MX_BLOCK, number, codes, left)
        if scales is kernels.MISSING:
            return None
        body[:split] = scales.view(np.uint32) >> 23  # the exponent; 2^-127 is denormal and has 0 there
        if bits < 8:
            body[split:] = pack_codes(codes, bits)
        return seal(data)

    def _add_body(self, body: Bytes, out: Floats, weight: np.float32) -> None:
        if self._look_up(body, out, float(weight)) is kernels.MISSING:
            super()._add_body(body, out, weight)

    def _decode_body(self, body: Bytes, num_elements: int) -> Floats:
        out = np.empty(num_elements, np.float32)
        if self._look_up(body, out, None) is not kernels.MISSING:
            return out
        scales = self._scales(body, num_elements)
        codes = unpack_codes("Mx", body[scales.size :], num_elements, self._bits)
        with np.errstate(over="ignore"):
            values = self._table()[codes] * per_element(scales, _MX_BLOCK, num_elements)
        return expect_finite("Mx", values)

    def _look_up(self, body: Bytes, out: Floats, weight: float | None) -> kernels.Missing | None:
        scales, bits = self._scales(body, out.size), self._bits
        packed = body[scales.size :]
        expect_no_more_bits("Mx", packed, out.size, bits)
        return kernels.look_up("Mx", packed, bits, self._table(), scales, _MX_BLOCK, weight, out)

    def _scales(self, body: Bytes, num_elements: int) -> Floats:
        split = num_blocks(num_elements, _MX_BLOCK)
        expect_body("Mx", body, split + packed_bytes(num_elements, self._bits))
        if (body[:split] == 255).any():
            raise PayloadError("Mx payload has a NaN scale")
        return _E8M0[body[:split]]

    def _table(self) -> Floats:
        """The number of every code; NaN for those that are never written."""
        return _INT8_VALUES if self.format == "int8" else _MINIFLOATS[self.format].values()


_MX_BLOCK = 32
_E8M0_BIAS = 127
_E8M0 = np.ldexp(np.float32(1), np.arange(255) - _E8M0_BIAS).astype(np.float32)
_INT8_VALUES = (np.arange(256, dtype=np.uint8).view(np.int8) / np.float32(64)).astype(np.float32)
_INT8_VALUES[128] = np.nan
_INT8_FOR_KERNELS = kernels.MinifloatFormat(8, 6, 0, 127 / 64, 1, 0.0, 0)


@dataclass(frozen=True)
class _Minifloat:
    """A float of few bits: sign, exponent with bias ``2^(exponent_bits - 1) - 1``, mantissa; subnormals, no infinity.

    The code of a magnitude is its rank among all magnitudes, as in every IEEE format.
    """

    exponent_bits: int
    mantissa_bits: int
    largest: float

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def _least_exponent(self) -> int:
        return 2 - (1 << (self.exponent_bits - 1))

    def codes(self, values: Floats) -> Bytes:
        """Round to nearest, half to even; what is larger than ``largest`` becomes that."""
        codes = np.empty(values.size, np.uint8)
        for part in _parts(values.size):
            codes[part] = self._codes(values[part])
        return codes

    def _codes(self, values: Floats) -> Bytes:
        magnitude = np.minimum(np.abs(values), np.float32(self.largest))
        exponent = np.maximum((magnitude.view(np.int32) >> 23) - 127, self._least_exponent)
        # A power of two, put together from its bits: magnitude / 2^(exponent - mantissa_bits) is exact.
        factor = ((127 + self.mantissa_bits - exponent) << 23).astype(np.int32).view(np.float32)
        steps = np.rint(magnitude * factor).astype(np.int32)
        # A mantissa that is rounded up to the next power of two carries into the exponent by itself.
        code = ((exponent - self._least_exponent) << self.mantissa_bits) + steps
        sign = np.signbit(values).astype(np.int32) << (self.bits - 1)
        codes: Bytes = (code | sign).astype(np.uint8)
        return codes

    def for_kernels(self, largest_scale: float) -> kernels.MinifloatFormat:
        """With scales ``max|x| / largest`` up to ``largest_scale``, or powers of two if that is 0."""
        exponent = math.frexp(self.largest)[1] - 1
        sizes = (self.bits, self.mantissa_bits, self._least_exponent)
        return kernels.MinifloatFormat(*sizes, self.largest, 0, largest_scale, exponent)

    def values(self) -> Floats:
        """The number of every code; NaN for those that are never written."""
        return _table(self)


@cache
def _table(small: _Minifloat) -> Floats:
    code = np.arange(1 << (small.bits - 1))
    exponent, mantissa = code >> small.mantissa_bits, code & ((1 << small.mantissa_bits) - 1)
    whole = mantissa + ((exponent > 0) << small.mantissa_bits)
    magnitude = np.ldexp(whole, np.maximum(exponent, 1) - 1 + small._least_exponent - small.mantissa_bits)
    magnitude[magnitude > small.largest] = np.nan
    return np.concatenate([magnitude, -magnitude]).astype(np.float32)


_MINIFLOATS = {
    "e4m3": _Minifloat(4, 3, 448),
    "e5m2": _Minifloat(5, 2, 57344),
    "e3m2": _Minifloat(3, 2, 28),
    "e2m3": _Minifloat(2, 3, 7.5),
    "e2m1": _Minifloat(2, 1, 6),
}


def _parts(num_elements: int) -> Iterator[slice]:
    """Parts that stay in the cache over a row of NumPy operations; a whole tensor would leave it with each."""
    return (slice(first, first + (1 << 14)) for first in range(0, num_elements, 1 << 14))


def _check_format(codec: str, name: object, known: tuple[str, ...]) -> None:
    if name not in known:
        raise ValueError(f"{codec} format is {name!r}, expected {' or '.join(map(repr, known))}")


def _format(codec: str, number: int, known: tuple[str, ...]) -> str:
    if number >= len(known):
        raise PayloadError(f"{codec} format in the payload is {number}, expected 0 to {len(known) - 1}")
    return known[number]

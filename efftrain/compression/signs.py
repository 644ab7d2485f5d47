"""Dense codecs that send little more than the sign of each element."""

import math
import struct
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from efftrain.compression import kernels
from efftrain.compression.blocks import (
    check_block,
    expect_body,
    expect_no_more_bits,
    in_blocks,
    in_rows,
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
from efftrain.compression.wire import HEADER, Bytes, Floats, Payload, pack, seal, start
from efftrain.errors import PayloadError


@dataclass(frozen=True)
class Sign(Codec):
    """The sign of each element, 1 bit, times the mean magnitude of its block; zero counts as positive.

    It needs ``Feedback``: alone it does not converge where small entries carry the gradient (Karimireddy et al.,
    section 3). It fails on sparse tensors, where every zero becomes a step of the mean; there use ``TopK``.

    Args:
        block: Elements that share a magnitude, 1 to 65535; ``4 / block`` bytes an element more. Blocks much larger
            than a row of the weights mix magnitudes that differ.

    Source: scaled sign of Karimireddy et al., Error Feedback Fixes SignSGD (arXiv:1901.09847), algorithm 1; the blocks
        as in Zheng et al. (arXiv:1905.10936), section 3. 1-bit Adam (arXiv:2102.02888) sends its momentum in this form.
    """

    block: int = 256

    codec_id: ClassVar[int] = 6
    combine: ClassVar[Combine] = "two_phase"

    def __post_init__(self) -> None:
        check_block("Sign", self.block)

    def encoded_bytes(self, num_elements: int) -> int:
        """Header, one bit an element, four bytes a block."""
        return HEADER.size + 2 + 4 * num_blocks(num_elements, self.block) + packed_bytes(num_elements, 1)

    def _params(self) -> bytes:
        return struct.pack("<H", self.block)

    @classmethod
    def _from_params(cls, params: bytes) -> "Sign":
        if len(params) != 2 or params == b"\0\0":
            raise PayloadError(f"Sign parameters are {params.hex()}, expected a block of 1 to 65535")
        return cls(struct.unpack("<H", params)[0])

    def _encode_body(self, values: Floats, key: int) -> list[Bytes]:
        totals = _total_magnitudes(values, self.block)
        starts = np.arange(totals.size) * self.block
        means = (totals / np.minimum(self.block, values.size - starts)).astype(np.float32)
        return [scale_bytes(means), pack_codes((values < 0).view(np.uint8), 1)]

    def _encode_fused(self, values: Floats, residual: Floats | None, key: int, left: Floats | None) -> Payload | None:
        split = 4 * num_blocks(values.size, self.block)
        data, body = start(self.codec_id, self.params, values.size, split + packed_bytes(values.size, 1))
        scales = kernels.sign_encode(values, residual, self.block, body[split:], left)
        if scales is kernels.MISSING:
            return None
        body[:split] = scale_bytes(scales)
        return seal(data)

    def _decode_body(self, body: Bytes, num_elements: int) -> Floats:
        scales, packed = self._split(body, num_elements)
        done = kernels.sign_decode(scales, packed, num_elements, self.block)
        if done is not kernels.MISSING:
            return done
        negative = unpack_codes("Sign", packed, num_elements, 1)
        # The sign bit itself: one pass, no branch.
        magnitudes = per_element(scales, self.block, num_elements)
        return (magnitudes.view(np.uint32) | (negative.astype(np.uint32) << 31)).view(np.float32)

    def _add_body(self, body: Bytes, out: Floats, weight: np.float32) -> None:
        scales, packed = self._split(body, out.size)
        if kernels.sign_decode_add(scales, packed, self.block, float(weight), out) is kernels.MISSING:
            super()._add_body(body, out, weight)

    def _split(self, body: Bytes, num_elements: int) -> tuple[Floats, Bytes]:
        split = 4 * num_blocks(num_elements, self.block)
        expect_body("Sign", body, split + packed_bytes(num_elements, 1))
        expect_no_more_bits("Sign", body[split:], num_elements, 1)
        return read_scales("Sign", body[:split], 1), body[split:]


@dataclass(frozen=True)
class Ternary(Codec):
    """``s * sign(x)`` with probability ``|x| / s``, else 0; ``s = max|x|`` of the block. 1.6 bits an element, 5 a byte.

    Unbiased, so it converges without ``Feedback``, slowly where few large entries set ``s``: the variance of an element
    is ``|x| (s - |x|)``. With ``Feedback`` that noise comes back with every step; there ``IntN(2)`` is the better one.

    Args:
        block: Elements that share ``s``, 1 to 65535; ``4 / block`` bytes an element more. Smaller blocks have a smaller
            ``s`` and less noise.
        clip: Cut magnitudes at ``clip`` standard deviations of the tensor first; 0 does not. The paper's 2.5 shrinks
            ``s`` and with it the noise, and biases what is cut (``Feedback`` keeps that).

    Source: Wen et al., TernGrad (arXiv:1705.07878), sections 3.1 (ternarizing) and 3.3 (clipping). Differs: blocks in
        place of layers; ``block=65535`` is near the paper's.
    """

    block: int = 256
    clip: float = 0.0

    codec_id: ClassVar[int] = 7
    combine: ClassVar[Combine] = "two_phase"

    def __post_init__(self) -> None:
        check_block("Ternary", self.block)
        is_number = isinstance(self.clip, (int, float)) and not isinstance(self.clip, bool)
        if not is_number or not 0 <= self.clip < math.inf:
            raise ValueError(f"Ternary clip is {self.clip!r}, expected standard deviations, or 0 for none")

    def encoded_bytes(self, num_elements: int) -> int:
        """Header, a byte for five elements, four bytes a block."""
        return HEADER.size + 10 + 4 * num_blocks(num_elements, self.block) + -(-num_elements // 5)

    def _params(self) -> bytes:
        return struct.pack("<Hd", self.block, self.clip)

    @classmethod
    def _from_params(cls, params: bytes) -> "Ternary":
        block, clip = struct.unpack("<Hd", params) if len(params) == 10 else (0, 0.0)
        if block == 0 or not 0 <= clip < math.inf:
            raise PayloadError(f"Ternary parameters are {params.hex()}, expected a block of 1 to 65535 and a clip >= 0")
        return cls(block, clip)

    def _encode_body(self, values: Floats, key: int) -> list[Bytes]:
        if self.clip and values.size:
            bound = np.float32(min(self.clip * float(values.std(dtype=np.float64)), float(np.finfo(np.float32).max)))
            values = np.clip(values, -bound, bound)
        noise = _noise(values.size, key)
        ratio, scales = scaled(in_blocks(values, self.block), 1)
        ratio = ratio.reshape(-1)[: values.size]
        sent = noise < np.abs(ratio)
        digits = np.where(sent, np.where(ratio > 0, _PLUS, _MINUS), _ZERO)
        return [scale_bytes(scales), _pack(digits)]

    def _encode_fused(self, values: Floats, residual: Floats | None, key: int, left: Floats | None) -> Payload | None:
        if self.clip or kernels.available() is None:
            return None
        found = kernels.ternary(values, residual, _noise(values.size, key), self.block, left)
        if found is kernels.MISSING:
            return None
        scales, digits = found
        return pack(self.codec_id, self.params, values.size, [scale_bytes(scales), _pack(digits)])

    def _decode_body(self, body: Bytes, num_elements: int) -> Floats:
        scales, digits = self._split(body, num_elements)
        out = np.empty(num_elements, np.float32)
        if kernels.look_up("Ternary", digits, 8, _VALUES, scales, self.block, None, out) is kernels.MISSING:
            np.multiply(_VALUES[digits], per_element(scales, self.block, num_elements), out=out)
        return out

    def _add_body(self, body: Bytes, out: Floats, weight: np.float32) -> None:
        scales, digits = self._split(body, out.size)
        done = kernels.look_up("Ternary", digits, 8, _VALUES, scales, self.block, float(weight), out)
        if done is kernels.MISSING:
            out += weight * (_VALUES[digits] * per_element(scales, self.block, out.size))

    def _split(self, body: Bytes, num_elements: int) -> tuple[Floats, Bytes]:
        """Scales and digits; the digits are 0 to 2."""
        split = 4 * num_blocks(num_elements, self.block)
        expect_body("Ternary", body, split + -(-num_elements // 5))
        packed = body[split:]
        if packed.size and packed.max() >= 3**5:
            raise PayloadError("Ternary payload has a byte above 242, the largest of five digits")
        digits = _unpack(packed)
        if digits[num_elements:].any():
            raise PayloadError("Ternary payload has digits behind its last element")
        return read_scales("Ternary", body[:split], 1), digits[:num_elements]


def _noise(num_elements: int, key: int) -> Floats:
    return np.random.default_rng(key).random(num_elements, np.float32)


def _pack(digits: Bytes) -> Bytes:
    """Five digits a byte, the first one the least significant."""
    packed = kernels.pack_3(digits)
    return (in_rows(digits, 5) * _POWERS).sum(axis=1, dtype=np.uint8) if packed is kernels.MISSING else packed


def _unpack(packed: Bytes) -> Bytes:
    """Inverse of ``_pack``, five digits for each byte."""
    digits = kernels.unpack_3(packed)
    return (packed[:, None] // _POWERS % np.uint8(3)).reshape(-1) if digits is kernels.MISSING else digits


def _total_magnitudes(values: Floats, block: int) -> npt.NDArray[np.float64]:
    """Sum of the magnitudes of each block: 16 sums of every 16th element, then halves of them added (see ``efc.h``)."""
    magnitudes = np.abs(in_blocks(values, block))
    sums = np.zeros((len(magnitudes), 16))
    for first in range(0, min(block, values.size), 16):
        part = magnitudes[:, first : first + 16]
        sums[:, : part.shape[1]] += part
    for width in (8, 4, 2, 1):
        sums = sums[:, :width] + sums[:, width:]
    return sums[:, 0]


_ZERO, _PLUS, _MINUS = np.uint8(0), np.uint8(1), np.uint8(2)
_VALUES = np.zeros(256, np.float32)
_VALUES[1:3] = 1, -1
_POWERS = np.array([1, 3, 9, 27, 81], np.uint8)

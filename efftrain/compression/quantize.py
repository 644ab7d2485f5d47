"""Dense codecs: every element is sent, with fewer bits."""

import struct
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from efftrain.compression import kernels
from efftrain.compression.codec import Codec, Combine
from efftrain.compression.wire import HEADER, Bytes, Floats, Payload, seal, start
from efftrain.errors import PayloadError

Levels: TypeAlias = npt.NDArray[np.int8]


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

    def _decode_body(self, body: Bytes, num_elements: int) -> Floats:
        _expect_body("Identity", body, 4 * num_elements)
        values = body.view("<f4").astype(np.float32)
        _expect_finite("Identity", values)
        return values


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
        if type(self.block) is not int or not 1 <= self.block <= 65535:
            raise ValueError(f"Int8 block is {self.block!r}, expected a whole number, 1 to 65535")
        if self.rounding not in ("nearest", "stochastic"):
            raise ValueError(f"Int8 rounding is {self.rounding!r}, expected 'nearest' or 'stochastic'")

    def encoded_bytes(self, num_elements: int) -> int:
        """Header, one byte an element, four a block."""
        return HEADER.size + len(self._params()) + num_elements + 4 * self._num_blocks(num_elements)

    def _num_blocks(self, num_elements: int) -> int:
        return -(-num_elements // self.block)

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
        noise = np.random.default_rng(key) if self.rounding == "stochastic" else None
        scales, q = quantize(values, self.block, 127, noise)
        return [scale_bytes(scales), q.view(np.uint8)]

    def _encode_fused(self, values: Floats, residual: Floats | None, key: int, left: Floats | None) -> Payload | None:
        if self.rounding == "stochastic":
            return None
        split = 4 * self._num_blocks(values.size)
        data, body = start(self.codec_id, self._params(), values.size, split + values.size)
        q = body[split:].view(np.int8)
        scales = kernels.quantize(values, residual, self.block, 127, largest_scale(127), q, left)
        if scales is kernels.MISSING:
            return None
        body[:split] = scale_bytes(scales)
        return seal(data)

    def _decode_body(self, body: Bytes, num_elements: int) -> Floats:
        return dequantize(*self._split(body, num_elements), self.block)

    def _add_body(self, body: Bytes, out: Floats, weight: np.float32) -> None:
        scales, q = self._split(body, out.size)
        if kernels.dequantize_add(scales, q, self.block, float(weight), out) is kernels.MISSING:
            out += weight * dequantize(scales, q, self.block)

    def _split(self, body: Bytes, num_elements: int) -> tuple[Floats, Levels]:
        split = 4 * self._num_blocks(num_elements)
        _expect_body("Int8", body, num_elements + split)
        q = body[split:].view(np.int8)
        if q.size and q.min() == -128:
            raise PayloadError("Int8 payload holds -128, the levels are -127 to 127")
        return read_scales("Int8", body[:split], 127), q


def quantize(values: Floats, block: int, levels: int, noise: np.random.Generator | None) -> tuple[Floats, Levels]:
    """One scale a block, ``s = max|x| / levels``, and ``round(x / s)``.

    Args:
        values: Shape ``(N,)``, finite.
        block: Elements that share a scale.
        levels: Largest integer, up to 127.
        noise: For stochastic rounding, or ``None`` to round to nearest, half to even.

    Returns:
        Scales, shape ``(ceil(N / block),)``, and integers, shape ``(N,)``.
    """
    padded = in_blocks(values, block)
    scales = np.minimum(np.abs(padded).max(axis=1, initial=0) / np.float32(levels), largest_scale(levels))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = padded / scales[:, None]
    ratio[scales == 0] = 0  # all zero, or so small that the scale underflows: the residual keeps it
    if noise is not None:
        ratio += noise.random(ratio.shape, np.float32)
        np.floor(ratio, out=ratio)
    else:
        np.rint(ratio, out=ratio)
    # Among denormals a rounded scale may be a third too small.
    return scales, np.clip(ratio, -levels, levels).astype(np.int8).reshape(-1)[: values.size]


def dequantize(scales: Floats, q: Levels, block: int) -> Floats:
    """``q * scale``, shape ``(N,)``."""
    done = kernels.dequantize(scales, q, block)
    if done is not kernels.MISSING:
        return done
    return (in_blocks(q.astype(np.float32), block) * scales[:, None]).reshape(-1)[: q.size]


def in_blocks(values: Floats, block: int) -> Floats:
    """Shape ``(num_blocks, block)``, zeros behind the last element."""
    num_blocks = -(-values.size // block)
    if values.size == num_blocks * block:
        return values.reshape(num_blocks, block)
    padded = np.zeros((num_blocks, block), np.float32)
    padded.reshape(-1)[: values.size] = values
    return padded


@cache
def largest_scale(levels: float) -> np.float32:
    """Largest scale that ``levels`` times does not overflow. Next to the largest float32, rounding it up would."""
    top = np.finfo(np.float32).max
    scale = np.float32(top / np.float32(levels))
    return scale if float(scale) * levels <= float(top) else np.nextafter(scale, np.float32(0))


def scale_bytes(scales: Floats) -> Bytes:
    """Scales as a payload has them: float32, little endian."""
    return scales.astype("<f4", copy=False).view(np.uint8)


def read_scales(codec: str, body: Bytes, levels: float) -> Floats:
    """Scales of a payload.

    Raises:
        PayloadError: One is negative, not finite, or so large that ``levels`` times it overflows.
    """
    scales = np.frombuffer(body.tobytes(), "<f4").astype(np.float32)
    # NaN fails both comparisons.
    if scales.size and not (scales.min() >= 0 and scales.max() <= largest_scale(levels)):
        raise PayloadError(f"{codec} payload has a scale that is negative, overflowing or no number")
    return scales


def _expect_body(codec: str, body: Bytes, num_bytes: int) -> None:
    if body.size != num_bytes:
        raise PayloadError(f"{codec} body has {body.size} bytes, expected {num_bytes}")


def _expect_finite(codec: str, values: Floats) -> None:
    if not np.isfinite(values).all():
        raise PayloadError(f"{codec} payload holds inf or NaN")

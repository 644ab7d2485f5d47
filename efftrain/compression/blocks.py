"""Blocks of a flat tensor that share a scale, and codes of few bits packed into bytes."""

from functools import cache
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from efftrain.compression import kernels
from efftrain.compression.wire import Bytes, Floats
from efftrain.errors import PayloadError

Levels: TypeAlias = npt.NDArray[np.int8]


def num_blocks(num_elements: int, block: int) -> int:
    """Blocks of a tensor; the last one may be shorter."""
    return -(-num_elements // block)


def in_blocks(values: Floats, block: int) -> Floats:
    """Shape ``(num_blocks, block)``, zeros behind the last element."""
    blocks = num_blocks(values.size, block)
    if values.size == blocks * block:
        return values.reshape(blocks, block)
    padded = np.zeros((blocks, block), np.float32)
    padded.reshape(-1)[: values.size] = values
    return padded


def per_element(scales: Floats, block: int, num_elements: int) -> Floats:
    """The scale of each element, shape ``(N,)``."""
    return np.repeat(scales, block)[:num_elements]


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
    ratio, scales = scaled(padded, levels)
    if noise is not None:
        ratio += noise.random(ratio.shape, np.float32)
        np.floor(ratio, out=ratio)
    else:
        np.rint(ratio, out=ratio)
    return scales, np.clip(ratio, -levels, levels).astype(np.int8).reshape(-1)[: values.size]


def scaled(padded: Floats, levels: int) -> tuple[Floats, Floats]:
    """``x / s`` with ``s = max|x| / levels`` a row, and the scales ``s``, shape ``(rows,)``.

    A row whose scale is 0 (all zero, or so small that it underflows) gives zeros: the residual keeps it. Among
    denormals a rounded scale may be a third too small, and ``x / s`` then exceeds ``levels``.
    """
    scales = np.minimum(np.abs(padded).max(axis=1, initial=0) / np.float32(levels), largest_scale(levels))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = padded / scales[:, None]
    ratio[scales == 0] = 0
    return ratio, scales


def dequantize(codec: str, scales: Bytes, q: Levels, block: int, levels: int) -> Floats:
    """``q * scale``, shape ``(N,)``.

    Args:
        codec: Named in the error.
        scales: Of a payload, ``scale_bytes``.
        q: Shape ``(N,)``.
        block: Elements that share a scale.
        levels: Largest integer, up to 127.

    Raises:
        PayloadError: A scale or an integer is out of its range.
    """
    done = kernels.dequantize(scales, q, block, levels, largest_scale(levels))
    if done is not kernels.MISSING:
        return done
    if q.size and q.min() < -levels:
        raise PayloadError(f"{codec} payload holds {q.min()}, the levels are -{levels} to {levels}")
    each = read_scales(codec, scales, levels)
    return (in_blocks(q.astype(np.float32), block) * each[:, None]).reshape(-1)[: q.size]


def dequantize_add(
    codec: str, scales: Bytes, q: Levels, block: int, levels: int, weight: np.float32, out: Floats
) -> None:
    """``out += weight * dequantize(...)``."""
    done = kernels.dequantize_add(scales, q, block, levels, largest_scale(levels), float(weight), out)
    if done is kernels.MISSING:
        out += weight * dequantize(codec, scales, q, block, levels)


@cache
def largest_scale(levels: int) -> float:
    """Largest scale that ``levels`` times does not overflow. Next to the largest float32, rounding it up would."""
    top = np.finfo(np.float32).max
    scale = np.float32(top / np.float32(levels))
    return float(scale if float(scale) * levels <= float(top) else np.nextafter(scale, np.float32(0)))


def scale_bytes(scales: Floats) -> Bytes:
    """Scales as a payload has them: float32, little endian."""
    return scales.astype("<f4", copy=False).view(np.uint8)


def read_scales(codec: str, body: Bytes, levels: int) -> Floats:
    """Scales of a payload.

    Raises:
        PayloadError: One is negative, not finite, or so large that ``levels`` times it overflows.
    """
    scales = np.frombuffer(body.tobytes(), "<f4").astype(np.float32)
    # NaN fails both comparisons.
    if scales.size and not (scales.min() >= 0 and scales.max() <= largest_scale(levels)):
        raise PayloadError(f"{codec} payload has a scale that is negative, overflowing or no number")
    return scales


def packed_bytes(num_codes: int, bits: int) -> int:
    """Bytes that ``pack_codes`` writes."""
    return -(-num_codes * bits // 8)


def pack_codes(codes: Bytes, bits: int) -> Bytes:
    """The lowest ``bits`` of each code one behind the other, from the lowest bit of the first byte up.

    Args:
        codes: Shape ``(N,)``, uint8; higher bits are dropped.
        bits: 1, 2, 4, 6 or 8.

    Returns:
        Shape ``(packed_bytes(N, bits),)``; bits behind the last code are 0.
    """
    if bits == 8:
        return codes
    if bits in (1, 2, 4, 6):
        done = kernels.pack_codes(codes, bits)
        if done is not kernels.MISSING:
            return done
    each = 4 if bits == 6 else 8 // bits
    rows = in_rows(codes & np.uint8((1 << bits) - 1), each).astype(np.uint32)
    words = (rows << (bits * np.arange(each, dtype=np.uint32))).sum(axis=1, dtype=np.uint32)
    num_word_bytes = each * bits // 8
    packed = words.astype("<u4", copy=False).view(np.uint8).reshape(-1, 4)[:, :num_word_bytes]
    flat: Bytes = packed.reshape(-1)
    return flat[: packed_bytes(codes.size, bits)]


def unpack_codes(codec: str, packed: Bytes, num_codes: int, bits: int) -> Bytes:
    """Inverse of ``pack_codes``; ``packed`` has ``packed_bytes`` bytes.

    Raises:
        PayloadError: A bit behind the last code is set.
    """
    if bits == 8:
        return packed
    expect_no_more_bits(codec, packed, num_codes, bits)
    if bits in (1, 2, 4, 6):
        done = kernels.unpack_codes(packed, num_codes, bits)
        if done is not kernels.MISSING:
            return done
    each = 4 if bits == 6 else 8 // bits
    num_word_bytes = each * bits // 8
    words = np.zeros((-(-packed.size // num_word_bytes), 4), np.uint8)
    words[:, :num_word_bytes] = in_rows(packed, num_word_bytes)
    rows = words.view("<u4") >> (bits * np.arange(each, dtype=np.uint32))
    codes: Bytes = (rows & np.uint32((1 << bits) - 1)).astype(np.uint8).reshape(-1)
    return codes[:num_codes]


def in_rows(codes: Bytes, width: int) -> Bytes:
    """Shape ``(rows, width)``, zeros behind the last code."""
    padded = np.zeros(-(-codes.size // width) * width, np.uint8)
    padded[: codes.size] = codes
    return padded.reshape(-1, width)


def expect_body(codec: str, body: Bytes, num_bytes: int) -> None:
    """Raise ``PayloadError`` unless the body has ``num_bytes``."""
    if body.size != num_bytes:
        raise PayloadError(f"{codec} body has {body.size} bytes, expected {num_bytes}")


def expect_no_more_bits(codec: str, packed: Bytes, num_codes: int, bits: int) -> None:
    """Raise ``PayloadError`` if a bit behind the last code is set."""
    used = num_codes * bits % 8
    if used and packed[-1] >> used:
        raise PayloadError(f"{codec} payload has bits behind its last element")


def expect_finite(codec: str, values: Floats) -> Floats:
    """``values`` themselves; ``PayloadError`` if one is inf or NaN."""
    if not np.isfinite(values).all():
        raise PayloadError(f"{codec} payload holds inf or NaN")
    return values


def check_block(codec: str, block: object) -> None:
    """Raise ``ValueError`` unless ``block`` fits the two bytes that payloads have for it."""
    if type(block) is not int or not 1 <= block <= 65535:
        raise ValueError(f"{codec} block is {block!r}, expected a whole number, 1 to 65535")

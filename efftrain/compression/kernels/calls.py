"""Typed doors to the compiled kernels (``efc.h`` has their contracts).

Each returns ``MISSING`` where there is no compiled library, and the caller goes its NumPy way. Sizes are checked by the
callers; arrays are contiguous and of the type said.
"""

import ctypes
import enum
from typing import Any, Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from efftrain.compression.kernels.build import library
from efftrain.compression.wire import Bytes, Floats
from efftrain.errors import NonFiniteError, PayloadError

Places: TypeAlias = npt.NDArray[np.int64]
Levels: TypeAlias = npt.NDArray[np.int8]


class _Missing(enum.Enum):
    MISSING = enum.auto()


MISSING: Final = _Missing.MISSING
Missing: TypeAlias = Literal[_Missing.MISSING]


def top_k(a: Floats, b: Floats | None, k: int, out: Floats | None) -> tuple[Places, Floats] | Missing:
    """Places of the ``k`` largest magnitudes of ``a + b``, ascending, and the sum there. The sum is left in ``out``.

    Args:
        a: Shape ``(N,)``.
        b: Shape ``(N,)`` or ``None`` for zero.
        k: ``1 <= k <= N``.
        out: Shape ``(N,)``; may be ``None`` if ``b`` is.

    Raises:
        NonFiniteError: The sum holds inf or NaN; the message does not say where.
    """
    efc = library()
    if efc is None or a.size >= 1 << 31:
        return MISSING
    # The sample aims at 1.3 k candidates; twice that is room for tensors that it does not describe well.
    room = k if k > a.size // 4 else min(a.size, 3 * k + 4096)
    places, values = np.empty(room, np.int64), np.empty(room, np.float32)
    _finite(efc.efc_top_k_f32(_at(a), _at(b), _long(a.size), _long(k), _at(out), _at(places), _at(values), _long(room)))
    return places[:k].copy(), values[:k].copy()


def quantize(
    a: Floats,
    b: Floats | None,
    block: int,
    levels: int,
    largest_scale: float,
    scales: Bytes,
    q: Bytes,
    left: Floats | None,
) -> Missing | None:
    """Scales of ``a + b`` and its integers, rounded to nearest, as a payload has them.

    Args:
        a: Shape ``(N,)``.
        b: Shape ``(N,)`` or ``None`` for zero.
        block: Elements that share a scale.
        levels: Largest integer, up to 127.
        largest_scale: Larger scales are cut to it.
        scales: Shape ``(4 * ceil(N / block),)``, filled here.
        q: Shape ``(N,)``, filled here with the bytes of int8.
        left: Shape ``(N,)``, filled with what the integers do not say; may be ``None`` if ``b`` is.

    Raises:
        NonFiniteError: The sum holds inf or NaN; the message does not say where.
    """
    efc = library()
    if efc is None:
        return MISSING
    sizes = (_long(a.size), _long(block), ctypes.c_int32(levels), ctypes.c_float(largest_scale))
    _finite(efc.efc_quantize_f32(_at(a), _at(b), *sizes, _at(scales), _at(q), _at(left)))
    return None


def dequantize(scales: Bytes, q: Levels, block: int, levels: int, largest_scale: float) -> Floats | Missing:
    """``q * scale``, shape ``(N,)``; ``MISSING`` if a scale or an integer is none that ``quantize`` gives."""
    efc = library()
    if efc is None:
        return MISSING
    out = np.empty(q.size, np.float32)
    sizes = (_long(q.size), _long(block), ctypes.c_int32(levels), ctypes.c_float(largest_scale))
    return MISSING if efc.efc_dequantize_f32(_at(scales), _at(q), *sizes, _at(out)) else out


def dequantize_add(
    scales: Bytes, q: Levels, block: int, levels: int, largest_scale: float, weight: float, out: Floats
) -> Missing | None:
    """``out += weight * (q * scale)``; ``MISSING`` as ``dequantize``, and ``out`` is then unchanged."""
    efc = library()
    if efc is None or not out.flags.c_contiguous:
        return MISSING
    sizes = (_long(q.size), _long(block), ctypes.c_int32(levels), ctypes.c_float(largest_scale))
    status = efc.efc_dequantize_add_f32(_at(scales), _at(q), *sizes, ctypes.c_float(weight), _at(out))
    return MISSING if status else None


def add_in_double(a: Floats, weight: float, out: npt.NDArray[np.float64]) -> Missing | None:
    """``out += weight * a`` in float64, without an array between; shapes ``(N,)``."""
    efc = library()
    if efc is None or not a.flags.c_contiguous:
        return MISSING
    efc.efc_add_f64(_at(a), _long(a.size), ctypes.c_double(weight), _at(out))
    return None


def sign_encode(a: Floats, b: Floats | None, block: int, packed: Bytes, left: Floats | None) -> Floats | Missing:
    """Mean magnitudes of the blocks of ``a + b``, shape ``(ceil(N / block),)``; its signs go to ``packed``.

    Args:
        a: Shape ``(N,)``.
        b: Shape ``(N,)`` or ``None`` for zero.
        block: Elements that share a scale.
        packed: Shape ``(ceil(N / 8),)``, filled here.
        left: Shape ``(N,)``, filled with what is not sent; may be ``None`` if ``b`` is.

    Raises:
        NonFiniteError: The sum holds inf or NaN; the message does not say where.
    """
    efc = library()
    if efc is None:
        return MISSING
    packed.fill(0)
    scales = np.empty(-(-a.size // block), np.float32)
    outputs = (_at(scales), _at(packed), _at(left))
    _finite(efc.efc_sign_encode_f32(_at(a), _at(b), _long(a.size), _long(block), *outputs))
    return scales


def sign_decode(scales: Floats, packed: Bytes, n: int, block: int) -> Floats | Missing:
    """``scale`` or ``-scale``, shape ``(n,)``."""
    efc = library()
    if efc is None:
        return MISSING
    out = np.empty(n, np.float32)
    efc.efc_sign_decode_f32(_at(scales), _at(packed), _long(n), _long(block), _at(out))
    return out


def sign_decode_add(scales: Floats, packed: Bytes, block: int, weight: float, out: Floats) -> Missing | None:
    """``out += weight * (scale or -scale)``."""
    efc = library()
    if efc is None or not out.flags.c_contiguous:
        return MISSING
    sizes = (_long(out.size), _long(block), ctypes.c_float(weight))
    efc.efc_sign_decode_add_f32(_at(scales), _at(packed), *sizes, _at(out))
    return None


def half_encode(a: Floats, b: Floats | None, bf16: bool, codes: Bytes, left: Floats | None) -> Missing | None:
    """``a + b`` as 16-bit floats in ``codes``, shape ``(2 N,)``, and in ``left`` (``None`` if ``b`` is) what they lose.

    Raises:
        NonFiniteError: The sum holds inf or NaN; the message does not say where.
    """
    efc = library()
    if efc is None:
        return MISSING
    _finite(efc.efc_half_encode_f32(_at(a), _at(b), _long(a.size), ctypes.c_int32(bf16), _at(codes), _at(left)))
    return None


def half_decode(codes: Bytes, bf16: bool) -> Floats | Missing:
    """Inverse of ``half_encode``.

    Raises:
        PayloadError: A code is that of inf or NaN.
    """
    efc = library()
    if efc is None:
        return MISSING
    out = np.empty(codes.size // 2, np.float32)
    if efc.efc_half_decode_f32(_at(codes), _long(out.size), ctypes.c_int32(bf16), _at(out)):
        raise PayloadError("Half payload holds inf or NaN")
    return out


def half_decode_add(codes: Bytes, bf16: bool, weight: float, out: Floats) -> Missing | None:
    """``out += weight * x``.

    Raises:
        PayloadError: As ``half_decode``; ``out`` is unchanged.
    """
    efc = library()
    if efc is None or not out.flags.c_contiguous:
        return MISSING
    sizes = (_long(out.size), ctypes.c_int32(bf16), ctypes.c_float(weight))
    if efc.efc_half_decode_add_f32(_at(codes), *sizes, _at(out)):
        raise PayloadError("Half payload holds inf or NaN")
    return None


def ternary(
    a: Floats, b: Floats | None, noise: Floats, block: int, left: Floats | None
) -> tuple[Floats, Bytes] | Missing:
    """Scales of ``a + b``, shape ``(ceil(N / block),)``, and its digits, shape ``(N,)``: 0, 1 for +, 2 for -.

    Args:
        a: Shape ``(N,)``.
        b: Shape ``(N,)`` or ``None`` for zero.
        noise: Shape ``(N,)``, in [0, 1).
        block: Elements that share a scale.
        left: Shape ``(N,)``, filled with what the digits do not say; may be ``None`` if ``b`` is.

    Raises:
        NonFiniteError: The sum holds inf or NaN; the message does not say where.
    """
    efc = library()
    if efc is None:
        return MISSING
    scales, digits = np.empty(-(-a.size // block), np.float32), np.empty(a.size, np.uint8)
    outputs = (_at(scales), _at(digits), _at(left))
    _finite(efc.efc_ternary_f32(_at(a), _at(b), _at(noise), _long(a.size), _long(block), *outputs))
    return scales, digits


def pack_3(digits: Bytes) -> Bytes | Missing:
    """Five digits of base 3 in each byte, the first one the least significant."""
    efc = library()
    if efc is None:
        return MISSING
    packed = np.empty(-(-digits.size // 5), np.uint8)
    efc.efc_pack_3_u8(_at(digits), _long(digits.size), _at(packed))
    return packed


def unpack_3(packed: Bytes) -> Bytes | Missing:
    """Inverse of ``pack_3``, five digits for each byte."""
    efc = library()
    if efc is None:
        return MISSING
    digits = np.empty(5 * packed.size, np.uint8)
    efc.efc_unpack_3_u8(_at(packed), _long(packed.size), _at(digits))
    return digits


def at_least(x: Floats, threshold: float, room: int) -> Places | Missing | None:
    """Places of all magnitudes of at least ``threshold``, ascending; ``None`` if they are more than ``room``."""
    efc = library()
    if efc is None:
        return MISSING
    places = np.empty(room, np.int64)
    efc.efc_at_least_f32.restype = ctypes.c_int64
    found = efc.efc_at_least_f32(_at(x), _long(x.size), ctypes.c_float(threshold), _at(places), _long(room))
    return places[:found] if found <= room else None


class MinifloatFormat(ctypes.Structure):
    """A number format of few bits; ``efc.h`` says what its fields are."""

    _fields_ = (
        ("bits", ctypes.c_int32),
        ("mantissa_bits", ctypes.c_int32),
        ("least_exponent", ctypes.c_int32),
        ("largest", ctypes.c_float),
        ("twos_complement", ctypes.c_int32),
        ("largest_scale", ctypes.c_float),
        ("largest_exponent", ctypes.c_int32),
    )


def encode_minifloats(
    a: Floats, b: Floats | None, block: int, number: MinifloatFormat, codes: Bytes, left: Floats | None
) -> Floats | Missing:
    """Scales of ``a + b``, shape ``(ceil(N / block),)``; the codes of its small floats go to ``codes``.

    Args:
        a: Shape ``(N,)``.
        b: Shape ``(N,)`` or ``None`` for zero.
        block: Elements that share a scale.
        number: Format of the small floats and rule of the scales.
        codes: Shape ``(N,)``, filled here.
        left: Shape ``(N,)``, filled with what the codes do not say; may be ``None`` if ``b`` is.

    Raises:
        NonFiniteError: The sum holds inf or NaN; the message does not say where.
    """
    efc = library()
    if efc is None:
        return MISSING
    scales = np.empty(-(-a.size // block), np.float32)
    outputs = (_at(scales), _at(codes), _at(left))
    _finite(efc.efc_minifloat_f32(_at(a), _at(b), _long(a.size), _long(block), number, *outputs))
    return scales


def look_up(
    codec: str, packed: Bytes, bits: int, table: Floats, scales: Floats, block: int, weight: float | None, out: Floats
) -> Missing | None:
    """``out = table[code] * scale``, or, with a weight, ``out += weight * (table[code] * scale)``.

    Args:
        codec: Named in the error.
        packed: As ``pack_codes`` writes them; with 8 bits the codes themselves.
        bits: 1, 2, 4, 6 or 8.
        table: Shape ``(2**bits,)``; NaN for codes that nobody writes.
        scales: Shape ``(ceil(N / block),)``.
        block: Elements that share a scale.
        weight: Or ``None`` to overwrite.
        out: Shape ``(N,)``.

    Raises:
        PayloadError: A product of table and scale is inf or NaN; ``out`` is unchanged.
    """
    efc = library()
    if efc is None or not out.flags.c_contiguous:
        return MISSING
    factor = None if weight is None else ctypes.byref(ctypes.c_float(weight))
    sizes = (_long(out.size), ctypes.c_int32(bits))
    if efc.efc_lookup_f32(_at(packed), *sizes, _at(table), _at(scales), _long(block), factor, _at(out)):
        raise PayloadError(f"{codec} payload has a code that is never written, or overflows")
    return None


def encode_places(places: Places, low: int, num_low_bytes: int, num_high_bytes: int) -> Bytes | Missing:
    """Elias-Fano code: the low bits, then the bitmap of the high ones."""
    efc = library()
    if efc is None or low > 31:
        return MISSING
    coded = np.zeros(num_low_bytes + num_high_bytes, np.uint8)
    lows, highs = coded[:num_low_bytes], coded[num_low_bytes:]
    efc.efc_index_encode_s64(_at(places), _long(places.size), ctypes.c_int32(low), _at(lows), _at(highs))
    return coded


def decode_places(coded: Bytes, num_low_bytes: int, k: int, n: int, low: int) -> Places | Missing:
    """Inverse of ``encode_places``.

    Raises:
        PayloadError: The bits are not ``k`` strictly ascending places below ``n``.
    """
    efc = library()
    if efc is None or low > 31 or n > 1 << 48:
        return MISSING
    lows, highs = coded[:num_low_bytes], coded[num_low_bytes:]
    places = np.empty(k, np.int64)
    arguments = (_at(lows), _at(highs), _long(highs.size), _long(k), _long(n), ctypes.c_int32(low), _at(places))
    if efc.efc_index_decode_s64(*arguments):
        raise PayloadError(f"the index bits are not {k} strictly ascending indices below {n}")
    return places


def scatter(places: Places, values: Floats, out: Floats) -> Missing | None:
    """``out[places] = values``; places are below ``N`` and none is there twice."""
    efc = library()
    if efc is None or not out.flags.c_contiguous:
        return MISSING
    efc.efc_scatter_f32(_at(places), _at(values), _long(places.size), _at(out))
    return None


def scatter_add(places: Places, values: Floats, weight: float, out: Floats) -> Missing | None:
    """``out[places] += weight * values``; places are below ``N`` and none is there twice."""
    efc = library()
    if efc is None or not out.flags.c_contiguous:
        return MISSING
    efc.efc_scatter_add_f32(_at(places), _at(values), _long(places.size), ctypes.c_float(weight), _at(out))
    return None


def merge(
    places_a: Places, values_a: Floats, places_b: Places, values_b: Floats, weight: float
) -> tuple[Places, Floats] | Missing:
    """Places and values of ``a + weight * b``, two sparse tensors with strictly ascending places."""
    efc = library()
    if efc is None:
        return MISSING
    room = places_a.size + places_b.size
    places, values = np.empty(room, np.int64), np.empty(room, np.float32)
    a = _at(places_a), _at(values_a), _long(places_a.size)
    b = _at(places_b), _at(values_b), _long(places_b.size)
    efc.efc_merge_f32.restype = ctypes.c_int64
    k = efc.efc_merge_f32(*a, *b, ctypes.c_float(weight), _at(places), _at(values))
    return places[:k], values[:k]


def pack_codes(codes: Bytes, bits: int) -> Bytes | Missing:
    """The lowest ``bits`` (1, 2, 4 or 6) of each code, packed from the lowest bit up."""
    efc = library()
    if efc is None:
        return MISSING
    packed = np.empty(-(-codes.size * bits // 8), np.uint8)
    efc.efc_pack_u8(_at(codes), _long(codes.size), ctypes.c_int32(bits), _at(packed))
    return packed


def unpack_codes(packed: Bytes, n: int, bits: int) -> Bytes | Missing:
    """Inverse of ``pack_codes`` for ``n`` codes."""
    efc = library()
    if efc is None:
        return MISSING
    codes = np.empty(n, np.uint8)
    efc.efc_unpack_u8(_at(packed), _long(n), ctypes.c_int32(bits), _at(codes))
    return codes


def _at(array: npt.NDArray[Any] | None) -> Any:
    """An argument of a kernel, which keeps the array's memory until the call is over."""
    if array is None:
        return None
    flags = array.flags
    assert flags.c_contiguous, "kernels take contiguous arrays"
    if flags.writeable and array.size:  # a third of the time, which small tensors are made of
        return ctypes.byref(ctypes.c_char.from_buffer(array))  # type: ignore[arg-type]
    return ctypes.c_void_p(array.ctypes.data)


_long = ctypes.c_int64


def _finite(status: int) -> None:
    if status:
        raise NonFiniteError("a sum holds inf or NaN")

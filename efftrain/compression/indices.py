"""Sorted indices as bits: Elias-Fano coding.

``K`` ascending indices below ``N`` are split into ``low = floor(log2(N / K))`` low bits, packed as they are, and the
rest, written in unary into one bitmap: index ``i`` of value ``v`` sets bit ``(v >> low) + i``. That takes
``low + 2`` bits an index at most (the bound is ``log2(N / K) + 1.44``), and the size depends on ``K`` and ``N`` alone,
so ranks may exchange payloads with collectives of equal parts.

Source: Elias, Efficient storage and retrieval by content and address of static files (J. ACM 21, 1974).
"""

import numpy as np
import numpy.typing as npt

from efftrain.compression import kernels
from efftrain.compression.wire import Bytes
from efftrain.errors import PayloadError

# N upper bound of the indices, K number of them


def index_bytes(k: int, n: int) -> int:
    """Bytes that ``encode_indices`` writes for ``k`` indices below ``n``; none or all of them need no bytes."""
    if k in (0, n):
        return 0
    low = _low_bits(k, n)
    return -(-k * low // 8) + -(-_num_high_bits(k, n, low) // 8)


def largest_index_bytes(k: int, n: int) -> int:
    """Most bytes that ``encode_indices`` writes for up to ``k`` indices below ``n``."""
    # With the number of low bits fixed, more indices take more bytes; n >> low is the most that have this many.
    most = [min(k, n - 1), *(n >> low for low in range(1, n.bit_length()))]
    return max((index_bytes(count, n) for count in most if 0 < count <= k), default=0)


def encode_indices(indices_K: npt.NDArray[np.int64], n: int) -> Bytes:
    """Code strictly ascending indices.

    Args:
        indices_K: Shape ``(K,)``, int64, strictly ascending, each in ``[0, n)``.
        n: Length of the tensor they point into.

    Returns:
        Shape ``(index_bytes(K, n),)``, uint8.
    """
    k = indices_K.size
    if k in (0, n):
        return np.empty(0, np.uint8)
    low = _low_bits(k, n)
    num_low_bytes, num_high_bytes = -(-k * low // 8), -(-_num_high_bits(k, n, low) // 8)
    coded = kernels.encode_places(indices_K, low, num_low_bytes, num_high_bytes)
    if coded is not kernels.MISSING:
        return coded
    low_bits = (indices_K[:, None] >> np.arange(low)) & 1
    high_bits = np.zeros(_num_high_bits(k, n, low), np.uint8)
    high_bits[(indices_K >> low) + np.arange(k)] = 1
    packed_low = np.packbits(low_bits.astype(np.uint8).reshape(-1), bitorder="little")
    return np.concatenate([packed_low, np.packbits(high_bits, bitorder="little")])


def decode_indices(coded: Bytes, k: int, n: int) -> npt.NDArray[np.int64]:
    """Inverse of ``encode_indices``.

    Raises:
        PayloadError: The bits are not ``k`` strictly ascending indices below ``n``.
    """
    if coded.size != index_bytes(k, n):
        raise PayloadError(f"{k} indices below {n} take {index_bytes(k, n)} bytes, found {coded.size}")
    if k in (0, n):
        return np.arange(k, dtype=np.int64)
    low = _low_bits(k, n)
    split = -(-k * low // 8)
    places = kernels.decode_places(coded, split, k, n, low)
    if places is not kernels.MISSING:
        return places
    high = np.flatnonzero(np.unpackbits(coded[split:], bitorder="little"))
    if high.size != k:
        raise PayloadError(f"the index bitmap marks {high.size} entries, expected {k}")
    bits = np.unpackbits(coded[:split], count=k * low, bitorder="little").reshape(k, low).astype(np.int64)
    indices: npt.NDArray[np.int64] = ((high - np.arange(k)) << low) + (bits << np.arange(low)).sum(axis=1)
    if indices[-1] >= n or (np.diff(indices) <= 0).any():
        raise PayloadError(f"indices in the payload are not strictly ascending below {n}")
    return indices


def _low_bits(k: int, n: int) -> int:
    return max(0, (n // k).bit_length() - 1)


def _num_high_bits(k: int, n: int, low: int) -> int:
    return k + ((n - 1) >> low)

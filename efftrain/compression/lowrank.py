"""Low-rank codec: a matrix is sent as the product of two thin ones."""

import math
import struct
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

import numpy as np

from efftrain.compression.blocks import expect_body, expect_finite
from efftrain.compression.codec import Codec, Combine
from efftrain.compression.mix import split_mix_64
from efftrain.compression.quantize import Identity
from efftrain.compression.wire import HEADER, Bytes, Floats
from efftrain.errors import PayloadError

# A matrix of M rows and N columns, of rank R

_LARGEST = float(np.finfo(np.float32).max)
_ITERATIONS = 2
_PART = 1 << 16
"""Elements of the product that are made at a time, so that they stay in the cache."""


@dataclass(frozen=True)
class LowRank(Codec):
    """The matrix ``M`` as ``P @ Q.T``, with ``rank`` columns each: ``rank * (rows + cols)`` floats.

    A gradient exchange sums ``P = M @ Q`` over the ranks, makes its columns orthonormal, and sums ``Q = M.T @ P``: two
    small all-reduces, no message grows with the number of ranks. It begins each step with the last step's ``Q``, so
    that the factors follow the gradient's largest singular vectors. ``encode`` alone has no last step: it begins with
    random values decided by the key and iterates twice, which is near the best choice where singular values fall fast.

    It needs ``Feedback``, since what lies outside the few directions is dropped. It fails where a gradient has no
    directions that stand out: flat spectra (embeddings with rare rows, depthwise convolutions), there use ``TopK``.

    Args:
        rank: Columns of each factor, 1 to 65535. A higher rank keeps more of the gradient and costs
            ``rank * (rows + cols)`` floats a step, and time for as many products.
        rows: Rows of the matrix; the number of elements is a multiple. 0 takes the largest divisor of ``N`` not above
            ``sqrt(N)``. ``for_tensor`` sets it, so recipes leave it out. Where the factors would not be smaller than
            the matrix, it is sent as it is.

    Source: Vogels et al., PowerSGD (arXiv:1905.13727), algorithm 1. Differs: standalone ``encode`` as said, with two
        iterations from a random start.
    """

    rank: int = 2
    rows: int = 0

    codec_id: ClassVar[int] = 12
    combine: ClassVar[Combine] = "low_rank"
    shared_key: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if type(self.rank) is not int or not 1 <= self.rank <= 65535:
            raise ValueError(f"LowRank rank is {self.rank!r}, expected a whole number, 1 to 65535")
        if type(self.rows) is not int or not 0 <= self.rows < 1 << 32:
            raise ValueError(f"LowRank rows is {self.rows!r}, expected a whole number below 2**32, or 0 to choose")

    def for_tensor(self, shape: tuple[int, ...]) -> Codec:
        """A tensor ``(a, b, c, ...)`` is the matrix ``a x (b * c * ...)``; vectors and small ones are sent whole."""
        rows, cols = (shape[0], math.prod(shape[1:])) if len(shape) >= 2 else (0, 0)
        if rows < 2 or cols < 2 or (rows + cols) * self.rank >= rows * cols:
            return Identity()
        return replace(self, rows=rows)

    def matrix_shape(self, n: int) -> tuple[int, int]:
        """Rows and columns of the matrix of ``n`` elements, whose product is ``n``.

        Raises:
            ValueError: ``n`` is no multiple of ``rows``.
        """
        if self.rows == 0:
            rows = _divisor_near_root(n)
        elif n % self.rows == 0:
            rows = self.rows
        else:
            raise ValueError(f"LowRank is fitted to {self.rows} rows, {n} elements are no multiple of that")
        return rows, n // max(rows, 1)

    def effective_rank(self, n: int) -> int:
        """Columns of the factors of ``n`` elements: ``min(rank, rows, cols)``."""
        return min(self.rank, *self.matrix_shape(n))

    def encoded_bytes(self, num_elements: int) -> int:
        """Header, 6 bytes, and 4 bytes for each element of both factors, or of the matrix if that is smaller."""
        return HEADER.size + 6 + 4 * min(num_elements, self._num_factor_elements(num_elements))

    def _num_factor_elements(self, n: int) -> int:
        return sum(self.matrix_shape(n)) * self.effective_rank(n)

    def _params(self) -> bytes:
        return struct.pack("<HI", self.rank, self.rows)

    @classmethod
    def _from_params(cls, params: bytes) -> "LowRank":
        rank, rows = struct.unpack("<HI", params) if len(params) == 6 else (0, 0)
        if rank == 0:
            raise PayloadError(f"LowRank parameters are {params.hex()}, expected a rank of 1 to 65535 and rows")
        return cls(rank, rows)

    def _encode_body(self, values: Floats, key: int) -> list[Bytes]:
        n = values.size
        if self._num_factor_elements(n) >= n:
            return [values.astype("<f4", copy=False).view(np.uint8)]
        factors = _power_iteration(values.reshape(self.matrix_shape(n)), self.effective_rank(n), key)
        return [factor.reshape(-1).astype("<f4", copy=False).view(np.uint8) for factor in factors]

    def _decode_body(self, body: Bytes, num_elements: int) -> Floats:
        n = num_elements
        if self.rows and n % self.rows:
            raise PayloadError(f"LowRank payload has {self.rows} rows and {n} elements, which are no multiple of that")
        (rows, _), rank = self.matrix_shape(n), self.effective_rank(n)
        expect_body("LowRank", body, 4 * min(n, self._num_factor_elements(n)))
        floats = np.frombuffer(body.tobytes(), "<f4").astype(np.float32)
        if self._num_factor_elements(n) >= n:
            return expect_finite("LowRank", floats)
        p_MR, q_NR = floats[: rows * rank].reshape(-1, rank), floats[rows * rank :].reshape(-1, rank)
        return expect_finite("LowRank", expand(p_MR, q_NR).reshape(-1))


def start_factor(cols: int, rank: int, key: int) -> Floats:
    """Random values to begin a power iteration with, the same on all machines.

    Args:
        cols: Columns of the matrix.
        rank: Columns of the factor.
        key: Decides the values; all ranks of an exchange take the same.

    Returns:
        Shape ``(cols, rank)``, float32, mean 0 and variance 1, nearly normal: sums of four uniform numbers.
    """
    bits = split_mix_64(key, cols * rank)
    pieces = [(bits >> np.uint64(shift) & np.uint64(0xFFFF)).astype(np.int64) for shift in (0, 16, 32, 48)]
    # Integers up to 2^18, exact in float32: one rounding, in the product.
    centered = (sum(pieces[1:], pieces[0]) - 2 * 0xFFFF).astype(np.float32)
    factor: Floats = centered * np.float32(math.sqrt(12 / 4) / (1 << 16))
    return factor.reshape(cols, rank)


def orthonormalize(p_MR: Floats) -> None:
    """Make the columns orthonormal in place, from the first to the last; equal input gives equal bits on any machine.

    A column that those before it explain (what is left of it is below a millionth of its norm, about the rounding of a
    float32 product) gives way to the unit vector that they cover least, cleared of them. So does one that holds inf or
    NaN: look for those before. Zeros in its place would stay for ever in an iteration that goes on with them, say after
    the first gradient of a layer was zero. Only columns beyond the number of rows become zero.

    Args:
        p_MR: Shape ``(rows, rank)``, float32.

    Source: modified Gram-Schmidt, as in Vogels et al. (arXiv:1905.13727). Differs: in float64, and sums go from the
        first row to the last, since those of BLAS go in an order that depends on the machine.
    """
    w_RM = np.ascontiguousarray(p_MR.T, np.float64)
    if w_RM.size == 0:
        return
    covered_M = np.zeros(w_RM.shape[1])
    with np.errstate(invalid="ignore"):
        norms_R = np.sqrt(_sum(w_RM * w_RM))
        for i, column in enumerate(w_RM):
            norm = np.sqrt(_sum(column * column))
            if not 1e-6 * norms_R[i] < norm < np.inf:
                column.fill(0)
                if i >= column.size:
                    continue
                least = np.argmin(covered_M)
                column[least] = 1
                for before in w_RM[:i]:
                    column -= _sum(column * before) * before
                norm = np.sqrt(_sum(column * column))
            column /= norm
            covered_M += column * column
            rest = w_RM[i + 1 :]
            rest -= _sum(rest * column)[:, None] * column
    p_MR[...] = w_RM.T


def _sum(terms: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Over the last axis, from the first term to the last."""
    return np.add.accumulate(terms, axis=-1)[..., -1]


def _power_iteration(matrix_MN: Floats, rank: int, key: int) -> tuple[Floats, Floats]:
    """``P`` with orthonormal columns and ``Q = M.T @ P``, finite whatever the finite matrix is."""
    largest = float(np.abs(matrix_MN).max())
    exponent = math.frexp(largest)[1]
    # Products of two such numbers, summed, neither overflow nor underflow; the power of two loses nothing.
    exponent = exponent if abs(exponent) > 32 else 0
    if exponent:
        matrix_MN = np.ldexp(matrix_MN, -exponent)
    q_NR = start_factor(matrix_MN.shape[1], rank, key)
    for _ in range(_ITERATIONS):
        p_MR = matrix_MN @ q_NR
        orthonormalize(p_MR)
        q_NR = matrix_MN.T @ p_MR
    # Sums may exceed the largest element. Next to the largest float32 the product is made smaller, until neither it nor
    # what it leaves of the matrix can overflow; the residual keeps the rest.
    bound = 1.001 * rank * math.ldexp(float(np.abs(q_NR).max()), exponent)
    if bound > _LARGEST - largest:
        q_NR *= np.float32((_LARGEST - largest) / bound)
    return p_MR, np.ldexp(q_NR, exponent) if exponent else q_NR


def expand(p_MR: Floats, q_NR: Floats) -> Floats:
    """``p @ q.T``, terms added from the first column to the last with one rounding each; BLAS has no fixed order."""
    q_RN = np.ascontiguousarray(q_NR.T)
    out_MN = np.empty((len(p_MR), len(q_NR)), np.float32)
    step = max(1, _PART // len(q_NR))
    term = np.empty((step, len(q_NR)), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for first in range(0, len(p_MR), step):
            p, out = p_MR[first : first + step], out_MN[first : first + step]
            np.multiply(p[:, :1], q_RN[0], out=out)
            for i in range(1, len(q_RN)):
                out += np.multiply(p[:, i : i + 1], q_RN[i], out=term[: len(p)])
    return out_MN


@lru_cache(maxsize=1024)
def _divisor_near_root(n: int) -> int:
    """The largest divisor of ``n`` not above its square root; 0 for 0."""
    return next((d for d in range(math.isqrt(n), 0, -1) if n % d == 0), 0)

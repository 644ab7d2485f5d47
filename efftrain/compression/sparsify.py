"""Sparse codecs: few elements are sent, with their places."""

import struct
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from efftrain.compression import kernels
from efftrain.compression.codec import Codec, Combine
from efftrain.compression.indices import decode_indices, encode_indices, index_bytes
from efftrain.compression.quantize import Identity, Int8
from efftrain.compression.wire import HEADER, Bytes, Floats, Payload, pack
from efftrain.errors import PayloadError

# N elements of the tensor, K of them sent

_VALUE_CODECS: dict[int, type[Codec]] = {Identity.codec_id: Identity, Int8.codec_id: Int8}


@dataclass(frozen=True)
class TopK(Codec):
    """Send the ``K`` elements of largest magnitude; the others are zero at the other end.

    Meant for ``Feedback``, which keeps what was not sent: without it small gradients are lost for ever. Of equal
    magnitudes the lower index is sent. It fails when the union over many ranks gets dense, and where all elements
    matter alike (an embedding's rare rows are fine).

    Args:
        ratio: Share of elements sent, in ``(0, 1]``; ``K = max(1, round(ratio * N))``, 0 for an empty tensor.
        values: Dense codec of the values sent: ``Identity`` (4 bytes each) or ``Int8`` (1 byte and its scales).
            ``TopK(0.01) >> Int8()`` sets it.
        dense_below: Tensors of fewer elements are sent whole. Biases and small heads weigh little on the wire and much
            in the model: at 5 % one entry of a bias of 16 moves a step.

    An element costs its value and ``2 + log2(1 / ratio)`` bits for its place (see ``indices``).

    Source: Lin et al., Deep Gradient Compression (arXiv:1712.01887), gradient sparsification.
        Differs: exact selection, no sampled threshold.
    """

    ratio: float = 0.01
    values: Codec = field(default_factory=Identity)
    dense_below: int = 0

    codec_id: ClassVar[int] = 3
    combine: ClassVar[Combine] = "gather"

    def __post_init__(self) -> None:
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, (int, float)) or not 0 < self.ratio <= 1:
            raise ValueError(f"TopK ratio is {self.ratio!r}, expected a share in (0, 1]")
        if type(self.dense_below) is not int or not 0 <= self.dense_below < 1 << 32:
            raise ValueError(f"TopK dense_below is {self.dense_below!r}, expected a number of elements below 2**32")
        if type(self.values) not in _VALUE_CODECS.values():
            names = " or ".join(codec.__name__ for codec in _VALUE_CODECS.values())
            raise ValueError(f"TopK values go through {names}, not {self.values}")

    def __rshift__(self, values: Codec) -> "TopK":
        """``TopK(0.01) >> Int8()``: the same selection, its values sent through another codec."""
        return replace(self, values=values)

    def num_sent(self, num_elements: int) -> int:
        """``K`` for a tensor of ``num_elements``."""
        if num_elements < self.dense_below:
            return num_elements
        return min(num_elements, max(1, round(self.ratio * num_elements)))

    def encoded_bytes(self, num_elements: int) -> int:
        """Header, places and values; depends on the number of elements alone."""
        k = self.num_sent(num_elements)
        value_bytes = self.values.encoded_bytes(k) - HEADER.size - len(self.values._params())
        return HEADER.size + len(self._params()) + index_bytes(k, num_elements) + value_bytes

    def _params(self) -> bytes:
        return struct.pack("<dIB", self.ratio, self.dense_below, self.values.codec_id) + self.values._params()

    @classmethod
    def _from_params(cls, params: bytes) -> "TopK":
        if len(params) < 13 or params[12] not in _VALUE_CODECS:
            raise PayloadError(f"TopK parameters are {params.hex()}, expected a ratio and a known codec of values")
        ratio, dense_below = struct.unpack("<dI", params[:12])
        if not 0 < ratio <= 1:
            raise PayloadError(f"TopK ratio in the payload is {ratio}, expected a share in (0, 1]")
        return cls(ratio, _VALUE_CODECS[params[12]]._from_params(params[13:]), dense_below)

    def _encode_body(self, values: Floats, key: int) -> list[Bytes]:
        indices_K = largest(values, self.num_sent(values.size))
        return [encode_indices(indices_K, values.size), *self.values._encode_body(values[indices_K], key)]

    def _encode_fused(self, values: Floats, residual: Floats | None, key: int, left: Floats | None) -> Payload | None:
        k = self.num_sent(values.size)
        if k == values.size:
            return None
        found = kernels.top_k(values, residual, k, left)
        if found is kernels.MISSING:
            return None
        indices_K, values_K = found
        body = self.values._encode_body(values_K, key)
        if left is not None:
            left[indices_K] = values_K - self.values._decode_body(np.concatenate(body), k)
        return pack(self.codec_id, self._params(), values.size, [encode_indices(indices_K, values.size), *body])

    def _decode_body(self, body: Bytes, num_elements: int) -> Floats:
        out = np.zeros(num_elements, np.float32)
        indices_K, values_K = self._decode_sparse(body, num_elements)
        out[indices_K] = values_K
        return out

    def _add_body(self, body: Bytes, out: Floats, weight: np.float32) -> None:
        indices_K, values_K = self._decode_sparse(body, out.size)
        out[indices_K] += weight * values_K

    def _decode_sparse(self, body: Bytes, num_elements: int) -> tuple[npt.NDArray[np.int64], Floats]:
        k = self.num_sent(num_elements)
        split = index_bytes(k, num_elements)
        if body.size < split:
            raise PayloadError(f"TopK body has {body.size} bytes, its {k} indices alone take {split}")
        indices_K = decode_indices(body[:split], k, num_elements)
        return indices_K, self.values._decode_body(np.ascontiguousarray(body[split:]), k)


def largest(values: Floats, k: int) -> npt.NDArray[np.int64]:
    """Ascending indices of the ``k`` largest magnitudes; of equal ones the lowest indices.

    Args:
        values: Shape ``(N,)``, float32, finite.
        k: ``0 <= k <= N``.

    Returns:
        Shape ``(k,)``, int64.
    """
    if k == values.size:
        return np.arange(k, dtype=np.int64)
    magnitude = np.abs(values)
    threshold = np.partition(magnitude, values.size - k)[values.size - k] if k else np.float32(np.inf)
    above = np.flatnonzero(magnitude > threshold)
    ties = np.flatnonzero(magnitude == threshold)[: k - above.size]
    return np.sort(np.concatenate([above, ties]))

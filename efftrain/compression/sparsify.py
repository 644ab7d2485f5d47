"""Sparse codecs: few elements are sent, with their places."""

import math
import struct
from abc import abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar, cast

import numpy as np
import numpy.typing as npt

from efftrain.compression import kernels
from efftrain.compression.codec import Codec, Combine, add
from efftrain.compression.floats import Fp8, Half, Mx
from efftrain.compression.indices import decode_indices, encode_indices, index_bytes, largest_index_bytes
from efftrain.compression.mix import split_mix_64
from efftrain.compression.quantize import Identity, Int8, IntN
from efftrain.compression.signs import Sign, Ternary
from efftrain.compression.wire import HEADER, Bytes, Floats, Payload, pack
from efftrain.errors import NonFiniteError, PayloadError

# N elements of the tensor, K of them sent

Indices = npt.NDArray[np.int64]

DENSE: tuple[type[Codec], ...] = (Identity, Int8, Half, IntN, Sign, Ternary, Fp8, Mx)
"""Codecs that may carry the values of a sparse one."""
_DENSE_BY_ID = {codec.codec_id: codec for codec in DENSE}
_MOST_STAGES = 5

S = TypeVar("S", bound="Sparse")


class Sparse(Codec):
    """What sparse codecs share: the values they choose go through a dense codec, the residual keeps all others.

    A subclass has the fields ``ratio`` and ``values`` and says which elements it sends and how it writes their places.
    """

    ratio: float
    values: Codec

    combine: ClassVar[Combine] = "gather"

    def __rshift__(self: S, values: Codec) -> S:
        """``TopK(0.01) >> Int8()``: the same selection, its values sent through another codec."""
        if hasattr(values, "__rrshift__"):
            return NotImplemented  # Deflate takes the whole body, places and values
        followed: S = replace(cast(Any, self), values=values)
        return followed

    def second_phase(self: S) -> S:
        """The ratio doubled, at most 1: the union of the ranks' choices is larger than one rank's."""
        return self._with_ratio(min(1.0, 2 * self.ratio))

    def warmed_up(self: S, progress: float) -> S:
        """Start at a quarter of the elements and send a quarter of that with every stage, down to ``ratio``.

        The stages take equal parts of the warm-up. There are as many as have a ratio above ours, at most 5, so that few
        sizes of messages occur: 25 %, 6.25 %, 1.56 %, 0.39 % and then 0.1 % for ``ratio=0.001``.

        Source: Lin et al., Deep Gradient Compression (arXiv:1712.01887), section 3.3.
        """
        super().warmed_up(progress)
        num_stages = sum(0.25**stage > self.ratio for stage in range(1, _MOST_STAGES + 1))
        if progress >= 1 or num_stages == 0:
            return self
        return self._with_ratio(0.25 ** (1 + math.floor(progress * num_stages)))

    def _with_ratio(self: S, ratio: float) -> S:
        changed: S = replace(cast(Any, self), ratio=ratio)
        return changed

    @abstractmethod
    def most_sent(self, num_elements: int) -> int:
        """Entries of a payload of ``num_elements``; for codecs of variable size the most."""

    def entries_of(self, body: Bytes, crc: int, num_elements: int) -> tuple[Indices, Floats]:
        """As ``add_body``, without a tensor: strictly ascending places, and the values there.

        Raises:
            PayloadError: As ``decode``.
        """
        self._check_crc(body, crc, num_elements)
        return self._decode_sparse(body, num_elements)

    @abstractmethod
    def _choose(self, owed: Floats, key: int) -> Indices:
        """Strictly ascending indices of the elements to send."""

    @abstractmethod
    def _write_places(self, indices_K: Indices, n: int, key: int) -> list[Bytes]:
        """Bytes from which the other end finds the places."""

    @abstractmethod
    def _read_places(self, body: Bytes, n: int) -> tuple[Indices, Bytes]:
        """Inverse of ``_write_places``: the indices, and the rest of the body."""

    def _encode_body(self, values: Floats, key: int) -> list[Bytes]:
        indices_K = self._choose(values, key)
        return [*self._write_places(indices_K, values.size, key), *self.values._encode_body(values[indices_K], key)]

    def _encode_fused(self, values: Floats, residual: Floats | None, key: int, left: Floats | None) -> Payload | None:
        """Touches only what is sent, where the general way would decode to a whole tensor and subtract it."""
        if left is None and residual is None:
            return None
        owed = add(values, residual, out=left)
        if not np.isfinite(owed).all():
            raise NonFiniteError("a sum holds inf or NaN")
        indices_K = self._choose(owed, key)
        return self._finish(indices_K, owed[indices_K], owed.size, key, left)

    def _finish(self, indices_K: Indices, values_K: Floats, n: int, key: int, left: Floats | None) -> Payload:
        """The payload; ``left`` has the whole sum and loses what is sent of it."""
        payload, left_K = self.values.encode_with_residual(values_K, None, key=key)
        if left is not None and kernels.scatter(indices_K, left_K, left) is kernels.MISSING:
            left[indices_K] = left_K
        body = self.values.body_of(payload)
        return pack(self.codec_id, self.params, n, [*self._write_places(indices_K, n, key), body])

    def _decode_body(self, body: Bytes, num_elements: int) -> Floats:
        indices_K, values_K = self._decode_sparse(body, num_elements)
        out = np.zeros(num_elements, np.float32)
        out[indices_K] = values_K
        return out

    def _add_body(self, body: Bytes, out: Floats, weight: np.float32) -> None:
        indices_K, values_K = self._decode_sparse(body, out.size)
        if kernels.scatter_add(indices_K, values_K, float(weight), out) is kernels.MISSING:
            out[indices_K] += weight * values_K

    def _decode_sparse(self, body: Bytes, n: int) -> tuple[Indices, Floats]:
        indices_K, rest = self._read_places(body, n)
        return indices_K, self.values._decode_body(np.ascontiguousarray(rest), indices_K.size)

    def _value_params(self) -> bytes:
        return bytes([self.values.codec_id]) + self.values.params

    def _value_bytes(self, k: int) -> int:
        return self.values.encoded_bytes(k) - HEADER.size - len(self.values.params)


@dataclass(frozen=True)
class TopK(Sparse):
    """Send the ``K`` elements of largest magnitude; the others are zero at the other end.

    Meant for ``Feedback``, which keeps what was not sent: without it small gradients are lost for ever. Of equal
    magnitudes the lower index is sent. It fails when the union over many ranks gets dense, and where all elements
    matter alike (an embedding's rare rows are fine).

    Args:
        ratio: Share of elements sent, in ``(0, 1]``; ``K = max(1, round(ratio * N))``, 0 for an empty tensor.
        values: Dense codec of the values sent: ``Identity`` (4 bytes each), ``Half`` (2), ``Int8`` or ``Fp8`` (1 and a
            scale a block), ``IntN(4)`` (half a byte), and so on. ``TopK(0.01) >> Int8()`` sets it. The values sent are
            all large, so few bits cost them little.
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

    def __post_init__(self) -> None:
        _check_ratio("TopK", self.ratio)
        if type(self.dense_below) is not int or not 0 <= self.dense_below < 1 << 32:
            raise ValueError(f"TopK dense_below is {self.dense_below!r}, expected a number of elements below 2**32")
        _check_values("TopK", self.values)

    def for_tensor(self, shape: tuple[int, ...]) -> "TopK":
        """Whether the tensor is sent whole (``dense_below``) is decided here, not for each piece of it."""
        return replace(self, ratio=1.0 if math.prod(shape) < self.dense_below else self.ratio, dense_below=0)

    def num_sent(self, num_elements: int) -> int:
        """``K`` for a tensor of ``num_elements``."""
        return num_elements if num_elements < self.dense_below else _share(self.ratio, num_elements)

    most_sent = num_sent

    def encoded_bytes(self, num_elements: int) -> int:
        """Header, places and values; depends on the number of elements alone."""
        k = self.num_sent(num_elements)
        return HEADER.size + len(self.params) + index_bytes(k, num_elements) + self._value_bytes(k)

    def _params(self) -> bytes:
        return struct.pack("<dI", self.ratio, self.dense_below) + self._value_params()

    @classmethod
    def _from_params(cls, params: bytes) -> "TopK":
        values = _values_from("TopK", params, 12)
        ratio, dense_below = struct.unpack("<dI", params[:12])
        return cls(_ratio_from("TopK", ratio), values, dense_below)

    def _encode_fused(self, values: Floats, residual: Floats | None, key: int, left: Floats | None) -> Payload | None:
        k = self.num_sent(values.size)
        if k < values.size:
            found = kernels.top_k(values, residual, k, left)
            if found is not kernels.MISSING:
                return self._finish(*found, values.size, key, left)
        return super()._encode_fused(values, residual, key, left)

    def _choose(self, owed: Floats, key: int) -> Indices:
        return largest(owed, self.num_sent(owed.size))

    def _write_places(self, indices_K: Indices, n: int, key: int) -> list[Bytes]:
        return [encode_indices(indices_K, n)]

    def _read_places(self, body: Bytes, n: int) -> tuple[Indices, Bytes]:
        return _split_places("TopK", body, self.num_sent(n), n)


@dataclass(frozen=True)
class RandomK(Sparse):
    """Send ``K`` elements at random places that the key alone decides: the message has the key and no places.

    The tensor is cut into ``K`` strata of equal length, one element of each is sent. With ``Feedback`` every element
    gets its turn; each waits ``1 / ratio`` steps on average, so it needs a far smaller learning rate or higher ratio
    than ``TopK``. Better than ``TopK`` where all elements matter alike, and where selecting costs too much.

    If all ranks encode with the same ``key`` (not one for each rank), they send the same places, and their values may
    be added without places, or all-reduced with ``values=Identity()``. With different keys the payloads are right, too,
    and have to be decoded each.

    Args:
        ratio: Share of elements sent, in ``(0, 1]``; ``K = max(1, round(ratio * N))``. ``N`` is below 2**31.
        values: As for ``TopK``. An element costs its value and nothing else.

    Source: Stich et al., Sparsified SGD with Memory (arXiv:1809.07599), rand-k. Differs: one element of each stratum in
        place of ``K`` of all, so that places come out sorted and cost no bytes and no search; not scaled by ``N / K``,
        since ``Feedback`` keeps the rest.
    """

    ratio: float = 0.01
    values: Codec = field(default_factory=Identity)

    codec_id: ClassVar[int] = 10
    shared_key: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_ratio("RandomK", self.ratio)
        _check_values("RandomK", self.values)

    def num_sent(self, num_elements: int) -> int:
        """``K`` for a tensor of ``num_elements``."""
        return _share(self.ratio, num_elements)

    most_sent = num_sent

    def second_phase(self) -> "RandomK":
        """Itself: with the same key the sum of the payloads has the places of each."""
        return self

    def places(self, num_elements: int, key: int) -> Indices:
        """The ascending indices that ``encode`` sends with this key."""
        return one_of_each_stratum(num_elements, self.num_sent(num_elements), key)

    def encoded_bytes(self, num_elements: int) -> int:
        """Header, 8 bytes of key, values."""
        return HEADER.size + len(self.params) + 8 + self._value_bytes(self.num_sent(num_elements))

    def _params(self) -> bytes:
        return struct.pack("<d", self.ratio) + self._value_params()

    @classmethod
    def _from_params(cls, params: bytes) -> "RandomK":
        values = _values_from("RandomK", params, 8)
        return cls(_ratio_from("RandomK", struct.unpack("<d", params[:8])[0]), values)

    def _choose(self, owed: Floats, key: int) -> Indices:
        return self.places(owed.size, key)

    def _write_places(self, indices_K: Indices, n: int, key: int) -> list[Bytes]:
        return [np.frombuffer(struct.pack("<Q", key % (1 << 64)), np.uint8)]

    def _read_places(self, body: Bytes, n: int) -> tuple[Indices, Bytes]:
        if body.size < 8:
            raise PayloadError(f"RandomK body has {body.size} bytes, its key alone takes 8")
        return self.places(n, struct.unpack("<Q", body[:8].tobytes())[0]), body[8:]


@dataclass(frozen=True)
class Threshold(Sparse):
    """Send what exceeds the threshold that a random sample suggests: about ``ratio`` of all elements.

    The threshold is that magnitude of the sample above which ``ratio`` of it lies. If more than ``2 K`` elements exceed
    it, the ``2 K`` largest are sent; there are never none. ``TopK`` sends the same within the noise of the sample, its
    number of bytes is known before, and compiled kernels make it faster: this is for machines without a compiler
    and for comparison with the paper. An exchange between ranks pads its messages to the largest.

    Args:
        ratio: Share of elements aimed at, in ``(0, 1]``; ``K = max(1, round(ratio * N))``. ``N`` is below 2**31.
        sample: Share of elements looked at, in ``(0, 1]``, but at least 1024. A larger sample comes closer to ``K``
            (the number sent has a relative standard error of about ``1 / sqrt(ratio * sample * N)``) and takes longer.
        values: As for ``TopK``.

    Source: Lin et al., Deep Gradient Compression (arXiv:1712.01887), section 5: threshold from 0.1 % to 1 % of the
        gradient, and a second, exact selection where it lets too many through.
    """

    ratio: float = 0.01
    sample: float = 0.01
    values: Codec = field(default_factory=Identity)

    codec_id: ClassVar[int] = 11
    fixed_size: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_ratio("Threshold", self.ratio)
        _check_ratio("Threshold", self.sample, "sample")
        _check_values("Threshold", self.values)

    def most_sent(self, num_elements: int) -> int:
        """``2 K``, or all elements if they are fewer."""
        return min(num_elements, 2 * _share(self.ratio, num_elements))

    def encoded_bytes(self, num_elements: int) -> int:
        """Header, 8 bytes for the number sent, places and values, where ``2 K`` elements are sent."""
        k = self.most_sent(num_elements)
        return HEADER.size + len(self.params) + 8 + largest_index_bytes(k, num_elements) + self._value_bytes(k)

    def _params(self) -> bytes:
        return struct.pack("<dd", self.ratio, self.sample) + self._value_params()

    @classmethod
    def _from_params(cls, params: bytes) -> "Threshold":
        values = _values_from("Threshold", params, 16)
        ratio, sample = struct.unpack("<dd", params[:16])
        return cls(_ratio_from("Threshold", ratio), _ratio_from("Threshold", sample, "sample"), values)

    def _choose(self, owed: Floats, key: int) -> Indices:
        n = owed.size
        if n == 0:
            return np.empty(0, np.int64)
        num_sampled = min(n, max(1024, round(self.sample * n)))
        sample = np.abs(owed[one_of_each_stratum(n, num_sampled, key)])
        rank = _share(self.ratio, num_sampled)
        threshold = np.partition(sample, num_sampled - rank)[num_sampled - rank]
        most = self.most_sent(n)
        found = kernels.at_least(owed, float(threshold), most)
        if found is not kernels.MISSING and found is not None:
            return found
        magnitude = np.abs(owed)
        indices = np.flatnonzero(magnitude >= threshold)
        return indices if indices.size <= most else indices[largest(magnitude[indices], most)]

    def _write_places(self, indices_K: Indices, n: int, key: int) -> list[Bytes]:
        return [np.frombuffer(struct.pack("<Q", indices_K.size), np.uint8), encode_indices(indices_K, n)]

    def _read_places(self, body: Bytes, n: int) -> tuple[Indices, Bytes]:
        k = struct.unpack("<Q", body[:8].tobytes())[0] if body.size >= 8 else -1
        if not min(1, n) <= k <= self.most_sent(n):
            raise PayloadError(f"Threshold body announces {k} of {n} elements, expected 1 to {self.most_sent(n)}")
        return _split_places("Threshold", body[8:], k, n)


def one_of_each_stratum(n: int, k: int, key: int) -> Indices:
    """``k`` ascending indices below ``n``, one of each of ``k`` strata; decided by ``key`` alone, on any machine.

    Stratum ``i`` begins at ``floor(i * n / k)``; the random number of ``i`` is the upper half of SplitMix64's output
    ``i + 1`` from the seed ``key`` (``docs/formats/wire.md``).
    """
    if k == 0:
        return np.empty(0, np.int64)
    starts = np.arange(k + 1, dtype=np.int64) * n // k
    random = split_mix_64(key, k) >> np.uint64(32)
    offsets = (random * np.diff(starts).astype(np.uint64)) >> np.uint64(32)
    indices: Indices = starts[:-1] + offsets.astype(np.int64)
    return indices


def largest(values: Floats, k: int) -> Indices:
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


def _share(ratio: float, num_elements: int) -> int:
    return min(num_elements, max(1, round(ratio * num_elements)))


def _split_places(codec: str, body: Bytes, k: int, n: int) -> tuple[Indices, Bytes]:
    split = index_bytes(k, n)
    if body.size < split:
        raise PayloadError(f"{codec} body has {body.size} bytes, its {k} indices alone take {split}")
    return decode_indices(body[:split], k, n), body[split:]


def _check_ratio(codec: str, ratio: object, name: str = "ratio") -> None:
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio <= 1:
        raise ValueError(f"{codec} {name} is {ratio!r}, expected a share in (0, 1]")


def _check_values(codec: str, values: object) -> None:
    if type(values) not in DENSE:
        names = ", ".join(dense.__name__ for dense in DENSE)
        raise ValueError(f"{codec} values go through one of {names}, not {values}")


def _ratio_from(codec: str, ratio: float, name: str = "ratio") -> float:
    if not 0 < ratio <= 1:
        raise PayloadError(f"{codec} {name} in the payload is {ratio}, expected a share in (0, 1]")
    return ratio


def _values_from(codec: str, params: bytes, start: int) -> Codec:
    """The codec of values whose id is at ``start`` and whose parameters follow."""
    if len(params) <= start or params[start] not in _DENSE_BY_ID:
        raise PayloadError(f"{codec} parameters are {params.hex()}, expected a ratio and a known codec of values")
    return _DENSE_BY_ID[params[start]]._from_params(params[start + 1 :])

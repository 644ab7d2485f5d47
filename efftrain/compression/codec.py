"""What a codec is: a pure, stateless pair of functions between a flat tensor and bytes.

A codec knows no transport. It says how its payloads combine, and the transport picks the collective from that.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np

from efftrain.compression.wire import HEADER, MAX_ELEMENTS, Bytes, Floats, Parts, Payload, checksum_of, pack, unpack
from efftrain.errors import NonFiniteError, PayloadError

Combine: TypeAlias = Literal["sum", "gather", "two_phase", "low_rank"]
"""How the payloads of several ranks become one tensor: ``sum`` (linear: the tensors may be all-reduced as they are),
``gather`` (exchange all payloads, decode each, add), ``two_phase`` (reduce-scatter, re-encode, all-gather),
``low_rank`` (two sums of small factors, see ``LowRank``). A transport may gather the payloads of any codec."""


@dataclass(frozen=True)
class Codec(ABC):
    """Base of all codecs. A subclass is a frozen dataclass whose fields are its knobs.

    Subclasses lay out parameters and body; header, checksum and argument checks live here, once.
    """

    codec_id: ClassVar[int]
    """Number in the payload header. Never reused."""
    combine: ClassVar[Combine]
    fixed_size: ClassVar[bool] = True
    """Whether the number of elements alone gives the number of bytes; see ``encoded_bytes``."""
    shared_key: ClassVar[bool] = False
    """Whether all ranks and both phases of an exchange encode with the same key, so that they choose the same places
    or begin with the same factor. Where it is not, every rank has its own, so that their errors are independent."""

    def encode(self, flat: Any, *, key: int = 0) -> Payload:
        """Turn a flat tensor into bytes.

        Args:
            flat: Shape ``(N,)``, float32 (or float16 / bfloat16, widened without loss); a NumPy array or a torch
                tensor (one on a GPU is copied to the host). Not changed.
            key: Seeds stochastic rounding; the same key and tensor give the same bytes. Ignored by the others.

        Raises:
            ValueError: Not flat, or not a floating-point type that fits float32.
            NonFiniteError: An entry is inf or NaN: it would poison the residual of every later step.
        """
        values = as_float32(flat)
        payload = self._try_fused(values, None, key, None)
        if payload is None:
            refuse_non_finite(values)
            payload = pack(self.codec_id, self.params, values.size, self._encode_body(values, key))
        return payload

    def encode_with_residual(
        self, flat: Any, residual: Floats | None, *, key: int = 0, out: Floats | None = None
    ) -> tuple[Payload, Floats]:
        """Encode a tensor plus what earlier steps left unsent, and say what is left unsent now.

        The payload is that of ``encode(flat + residual)``, and ``decode(payload) + left == flat + residual``: exactly
        where ``encode`` is sparse or rounds to nearest, within one ulp of the larger of both otherwise.

        Args:
            flat: As for ``encode``, shape ``(N,)``. Not changed.
            residual: Shape ``(N,)``, float32, contiguous, or ``None`` for zero. Not changed.
            key: As for ``encode``.
            out: Memory for ``left``, shape ``(N,)``, float32, contiguous, neither ``flat`` nor ``residual``; new memory
                if it is ``None``.

        Returns:
            The payload, and ``left``, shape ``(N,)``, float32.

        Raises:
            ValueError: As ``encode``, or the sizes differ.
            NonFiniteError: An entry of the sum is inf or NaN. ``out`` is then unspecified.
        """
        values = as_float32(flat)
        left = np.empty_like(values) if out is None else out
        for name, array in (("residual", residual), ("out", left)):
            if array is not None and (array.dtype != np.float32 or array.shape != values.shape):
                raise ValueError(f"{name} is {array.dtype} {array.shape}, expected float32 {values.shape}")
        fused = self._try_fused(values, residual, key, left)
        if fused is not None:
            return fused, left
        owed = add(values, residual)
        refuse_non_finite(owed)
        payload = pack(self.codec_id, self.params, values.size, self._encode_body(owed, key))
        np.negative(self.decode(payload, max_elements=owed.size), out=left)
        left += owed
        return payload, left

    def decode(self, payload: Any, *, max_elements: int = MAX_ELEMENTS) -> Floats:
        """Turn bytes made by an equal codec back into a tensor.

        Args:
            payload: A ``Payload`` or the bytes of one.
            max_elements: Refuse larger tensors.

        Returns:
            Shape ``(N,)``, float32. ``torch.from_numpy`` views it without a copy.

        Raises:
            PayloadError: For any bytes that ``encode`` of this codec cannot have written.
        """
        parts = unpack(payload, max_elements=max_elements)
        self._check_is_mine(parts)
        return self._decode_body(parts.body, parts.num_elements)

    def decode_add(self, payload: Any, out: Any, *, weight: float = 1.0) -> None:
        """Add ``weight * decode(payload)`` to ``out`` in place.

        Args:
            payload: A payload of exactly as many elements as ``out``.
            out: Shape ``(N,)``, float32, contiguous; a NumPy array or a torch tensor on the CPU.
            weight: Factor, e.g. one over the number of ranks.

        Raises:
            PayloadError: As ``decode``, or the number of elements differs from ``out``. ``out`` is then unchanged.
        """
        target: Floats = out.numpy() if hasattr(out, "numpy") else out
        if target.dtype != np.float32 or target.ndim != 1:
            raise ValueError(f"out is {target.dtype} {target.shape}, expected flat float32")
        parts = unpack(payload, max_elements=target.size)
        self._check_is_mine(parts)
        if parts.num_elements != target.size:
            raise PayloadError(f"payload holds {parts.num_elements} elements, expected {target.size}")
        self._add_body(parts.body, target, np.float32(weight))

    def add_body(self, body: Bytes, crc: int, out: Floats, weight: float = 1.0) -> None:
        """``decode_add`` of a payload whose header both ends know but for its checksum (see ``compact``).

        Raises:
            PayloadError: As ``decode_add``.
        """
        self._check_crc(body, crc, out.size)
        self._add_body(body, out, np.float32(weight))

    @cached_property
    def params(self) -> bytes:
        """The codec's parameters, as they stand behind the header of each payload."""
        return self._params()

    @property
    def num_param_bytes(self) -> int:
        """Length of ``params``."""
        return len(self.params)

    def body_of(self, payload: Payload) -> Bytes:
        """The bytes of a payload of this codec behind header and parameters; a view."""
        return payload.data[HEADER.size + self.num_param_bytes :]

    @abstractmethod
    def encoded_bytes(self, num_elements: int) -> int:
        """Size of a payload of ``num_elements``, header included; for codecs of variable size the largest one."""

    # What an exchange between ranks asks -------------------------------------------------------------------------

    def for_tensor(self, shape: tuple[int, ...]) -> "Codec":
        """The codec fitted to one tensor, which may then be cut into pieces without changing how it is sent.

        Args:
            shape: Of the whole tensor. What depends on it (``dense_below`` of ``TopK``, the matrix of ``LowRank``) is
                decided here.
        """
        return self

    def second_phase(self) -> "Codec":
        """What encodes the sum of several ranks' payloads again, in the second phase of a two-phase exchange.

        What it cuts off belongs to the error feedback of the rank that encodes.

        Source: error compensation in both passes, Tang et al., DoubleSqueeze (arXiv:1905.05957), algorithm 1.
        """
        return self

    def warmed_up(self, progress: float) -> "Codec":
        """The codec to use during the warm-up at the start of a training, when gradients change fast.

        Args:
            progress: Share of the warm-up that is over, in ``[0, 1)``; from 1 on it is this codec itself.

        Raises:
            ValueError: ``progress`` is negative or NaN.
        """
        if not progress >= 0:
            raise ValueError(f"progress of the warm-up is {progress}, expected 0 or more")
        return self

    # What a subclass lays out -----------------------------------------------------------------------------------

    @abstractmethod
    def _params(self) -> bytes:
        """Everything but the body that decoding needs, at most 255 bytes."""

    @classmethod
    @abstractmethod
    def _from_params(cls, params: bytes) -> "Codec":
        """Inverse of ``_params``. Raises ``PayloadError`` for any other bytes."""

    @abstractmethod
    def _encode_body(self, values: Floats, key: int) -> list[Bytes]:
        """Pieces of the body, in order. ``values`` is finite, flat and contiguous."""

    @abstractmethod
    def _decode_body(self, body: Bytes, num_elements: int) -> Floats:
        """Inverse of ``_encode_body``; must check every length and range itself."""

    def _encode_fused(self, values: Floats, residual: Floats | None, key: int, left: Floats | None) -> Payload | None:
        """The payload of ``values + residual``, and in ``left`` (unless it is ``None``) what it does not say.

        A codec that finds both in fewer passes than encoding and decoding take overrides this; both ways give the same
        bits. It raises ``NonFiniteError`` itself, without words. ``None``: there is no such way for this tensor.
        """
        return None

    def _try_fused(self, values: Floats, residual: Floats | None, key: int, left: Floats | None) -> Payload | None:
        try:
            return self._encode_fused(values, residual, key, left)
        except NonFiniteError:
            refuse_non_finite(add(values, residual))
            raise

    def _add_body(self, body: Bytes, out: Floats, weight: np.float32) -> None:
        """Add the decoded body to ``out``. Sparse codecs touch only the entries they sent."""
        out += weight * self._decode_body(body, out.size)

    def _check_crc(self, body: Bytes, crc: int, num_elements: int) -> None:
        if crc != checksum_of(self.codec_id, self.params, num_elements, body):
            raise PayloadError("payload checksum does not match: the bytes were changed, or are of another codec")

    def _check_is_mine(self, parts: Parts) -> None:
        if parts.codec_id != self.codec_id or parts.params != self.params:
            raise PayloadError(f"payload was not written by {self}; both ends of a wire need the same codec")


def add(values: Floats, residual: Floats | None, out: Floats | None = None) -> Floats:
    """``values + residual``; inf and NaN are for the caller to find. ``values`` itself if there is nothing to add."""
    if residual is not None:
        with np.errstate(over="ignore", invalid="ignore"):
            return np.add(values, residual, out=out)
    if out is None:
        return values
    np.copyto(out, values)
    return out


def as_float32(flat: Any) -> Floats:
    """View a flat NumPy array or torch tensor as contiguous float32 on the host; narrower floats are widened.

    Raises:
        ValueError: Not flat, or of a type whose values float32 cannot hold.
    """
    if hasattr(flat, "detach"):
        tensor = flat.detach()
        name = str(tensor.dtype).removeprefix("torch.")
        flat = (tensor.float() if name in ("float16", "bfloat16") else tensor).cpu().numpy()
    array = np.asarray(flat)
    if array.ndim != 1:
        raise ValueError(f"codecs take flat tensors, got shape {array.shape}; flatten it first")
    if array.dtype == np.float16:
        array = array.astype(np.float32)
    if array.dtype != np.float32:
        raise ValueError(f"codecs take float32, float16 or bfloat16, got {array.dtype}; convert it first")
    return np.ascontiguousarray(array)


def refuse_non_finite(values: Floats, name: str = "the tensor") -> None:
    """Raise ``NonFiniteError`` naming the tensor and its first bad entry."""
    finite = np.isfinite(values)
    if not finite.all():
        first = int(np.argmin(finite))
        raise NonFiniteError(
            f"{np.count_nonzero(~finite)} of {values.size} entries of {name} are inf or NaN, the first at index "
            f"{first}; codecs carry finite values only. Skip the step or lower the learning rate."
        )

"""Dense codecs: every element is sent, with fewer bits."""

import struct
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from efftrain.compression.codec import Codec, Combine
from efftrain.compression.wire import HEADER, Bytes, Floats
from efftrain.errors import PayloadError


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
        padded = self._padded(values)
        scales = np.abs(padded).max(axis=1, initial=0) / np.float32(127)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = padded / scales[:, None]
        ratio[scales == 0] = 0  # all zero, or so small that the scale underflows: the residual keeps it
        if self.rounding == "stochastic":
            ratio += np.random.default_rng(key).random(ratio.shape, np.float32)
            np.floor(ratio, out=ratio)
        else:
            np.rint(ratio, out=ratio)
        quantized = np.clip(ratio, -127, 127).astype(np.int8)
        return [scales.astype("<f4", copy=False).view(np.uint8), quantized.reshape(-1)[: values.size].view(np.uint8)]

    def _decode_body(self, body: Bytes, num_elements: int) -> Floats:
        scale_bytes = 4 * self._num_blocks(num_elements)
        _expect_body("Int8", body, num_elements + scale_bytes)
        scales = np.frombuffer(body[:scale_bytes].tobytes(), "<f4").astype(np.float32)
        _expect_finite("Int8", scales)
        if scales.size and (scales.min() < 0 or scales.max() > np.finfo(np.float32).max / 127):
            raise PayloadError("Int8 payload has a negative or overflowing scale")
        quantized = self._padded(body[scale_bytes:].view(np.int8).astype(np.float32))
        return (quantized * scales[:, None]).reshape(-1)[:num_elements]

    def _padded(self, values: Floats) -> Floats:
        """Shape ``(num_blocks, block)``, zeros behind the last element."""
        num_blocks = self._num_blocks(values.size)
        if values.size == num_blocks * self.block:
            return values.reshape(num_blocks, self.block)
        padded = np.zeros((num_blocks, self.block), np.float32)
        padded.reshape(-1)[: values.size] = values
        return padded


def _expect_body(codec: str, body: Bytes, num_bytes: int) -> None:
    if body.size != num_bytes:
        raise PayloadError(f"{codec} body has {body.size} bytes, expected {num_bytes}")


def _expect_finite(codec: str, values: Floats) -> None:
    if not np.isfinite(values).all():
        raise PayloadError(f"{codec} payload holds inf or NaN")

"""The trained state: what learns, in one canonical byte layout that every back end shares.

Layout, little-endian, without gaps: the step counter (uint32), then the biases of the layers whose biases are trained
(int32), then, with momentum or accumulation, what is kept for each bias and then for each weight (int32), then, if
weights are rounded stochastically, how far each bias but the head's has moved (int16, in place of the int32), then the
trained weights of each layer (int8, ``(O, H, W, k)`` for its first k input channels, or those of each group, O = 1 if
it is depthwise), then, with 16-bit master weights, their residuals in the same order and shape (int8). Layers are in
forward order.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from efftrain.ondevice.constants import BIAS_LIMIT, ConvConstants, Layers, Optimizer, layer_of
from efftrain.ondevice.scheme import Trained

Rounding = Literal["master", "stochastic"]
_SGD = Optimizer()
Part = Literal["step", "bias", "kept_bias", "kept_weight", "moved_bias", "weight", "residual"]
"""``kept`` is what an optimizer keeps of earlier steps."""

_DTYPES: Mapping[Part, str] = {
    "step": "<u4",
    "bias": "<i4",
    "kept_bias": "<i4",
    "kept_weight": "<i4",
    "moved_bias": "<i2",
    "weight": "i1",
    "residual": "i1",
}


@dataclass(frozen=True, slots=True)
class StateEntry:
    """One array in the state."""

    part: Part
    layer: str
    """Empty for the step counter."""
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * np.dtype(_DTYPES[self.part]).itemsize


@dataclass(frozen=True, slots=True)
class StateLayout:
    """Where everything is in the trained state of one program."""

    entries: tuple[StateEntry, ...]

    @property
    def num_bytes(self) -> int:
        """Length of ``engine.state()``."""
        last = self.entries[-1]
        return last.offset + last.num_bytes

    @property
    def ram_bytes(self) -> int:
        """What it takes in RAM: rounded up to whole words."""
        return -(-self.num_bytes // 4) * 4

    def find(self, part: Part, layer: str) -> StateEntry | None:
        """The entry of a layer, if it has one."""
        return next((e for e in self.entries if (e.part, e.layer) == (part, layer)), None)

    def unpack(self, state: bytes) -> dict[tuple[Part, str], npt.NDArray[np.int64]]:
        """The arrays of a state, by part and layer.

        Raises:
            ValueError: The length is wrong, or a value is outside the range that rules overflow out.
        """
        if len(state) != self.num_bytes:
            raise ValueError(f"the trained state has {len(state)} bytes; this program's has {self.num_bytes}")
        arrays: dict[tuple[Part, str], npt.NDArray[np.int64]] = {}
        for entry in self.entries:
            raw = np.frombuffer(state, _DTYPES[entry.part], math.prod(entry.shape), entry.offset)
            arrays[entry.part, entry.layer] = raw.astype(np.int64).reshape(entry.shape)
            limit = {"bias": BIAS_LIMIT, "weight": 127}.get(entry.part)
            if limit is not None and raw.size and int(np.abs(raw.astype(np.int64)).max()) > limit:
                raise ValueError(f"the trained state holds a {entry.part} of {entry.layer} outside [-{limit}, {limit}]")
        return arrays

    def pack(self, arrays: Mapping[tuple[Part, str], npt.NDArray[np.int64]]) -> bytes:
        """The inverse of ``unpack``."""
        return b"".join(
            np.ascontiguousarray(arrays[entry.part, entry.layer]).astype(_DTYPES[entry.part]).tobytes()
            for entry in self.entries
        )


def moves_biases(layer: ConvConstants, rounding: Rounding) -> bool:
    """Whether the state holds how far the biases of a layer have moved, if they are trained, and not the biases."""
    return rounding == "stochastic" and not layer.is_head


def lay_out(
    layers: Layers, trained: Mapping[str, Trained], rounding: Rounding, optimizer: Optimizer = _SGD
) -> StateLayout:
    """The layout for a scheme."""
    wanted: list[tuple[Part, str, tuple[int, ...]]] = [("step", "", (1,))]
    convs = [layer for layer in layers.values() if isinstance(layer, ConvConstants) and layer.trainable]
    biases = [(c.name, (c.shape.out_c,)) for c in convs if trained[c.name].bias]
    narrow = {c.name for c in convs if moves_biases(c, rounding)}
    wanted += [("bias", name, shape) for name, shape in biases if name not in narrow]
    if optimizer.keeps:
        wanted += [("kept_bias", name, shape) for name, shape in biases]
    parts: tuple[Part, ...] = ("kept_weight",) if optimizer.keeps else ()
    parts += ("weight", "residual") if rounding == "master" else ("weight",)
    for part in parts:
        if part == "weight":
            wanted += [("moved_bias", name, shape) for name, shape in biases if name in narrow]
        for conv in convs:
            if channels := trained[conv.name].channels:
                wanted.append((part, conv.name, (*conv.master.shape[:3], channels)))
    entries: list[StateEntry] = []
    offset = 0
    for part, name, shape in wanted:
        entries.append(StateEntry(part, name, shape, offset))
        offset += entries[-1].num_bytes
    return StateLayout(tuple(entries))


def initial_state(layout: StateLayout, layers: Layers) -> bytes:
    """The state before the first step."""
    arrays: dict[tuple[Part, str], npt.NDArray[np.int64]] = {("step", ""): np.zeros(1, np.int64)}
    for entry in layout.entries:
        if entry.part == "step":
            continue
        conv = layer_of(layers, entry.layer, ConvConstants)
        if entry.part == "bias":
            arrays[entry.part, entry.layer] = conv.bias
            continue
        if entry.part in ("kept_bias", "kept_weight", "moved_bias"):
            arrays[entry.part, entry.layer] = np.zeros(entry.shape, np.int64)
            continue
        weight, master = (a[..., : entry.shape[-1]] for a in (conv.weight, conv.master))
        arrays[entry.part, entry.layer] = weight if entry.part == "weight" else master - 256 * weight
    return layout.pack(arrays)

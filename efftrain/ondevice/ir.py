"""The intermediate representation: static shapes, channel last, batch 1, every tensor written once.

Two levels share the tensors. A ``FloatGraph`` is what the front end reads from a PyTorch module. A ``StepGraph`` is one
whole training step in integers, forward, loss, backward and updates, in the order in which a device will run it.
``verify.verify`` states what must hold for either; every pass is followed by it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt

DType = Literal["f32", "s8", "s16", "s32", "bit"]
Role = Literal["input", "activation", "mask", "logits", "gradient", "tile", "scratch"]
Shape = tuple[int, int, int]
"""Height, width, channels. A signal in time has height 1; a vector is 1 x 1 x channels."""
Padding = tuple[int, int, int, int]
"""Rows above, columns to the left, rows below, columns to the right."""

_BITS = {"f32": 32, "s8": 8, "s16": 16, "s32": 32, "bit": 1}


@dataclass(frozen=True, slots=True)
class TensorType:
    """What is known of a tensor before anything runs."""

    shape: Shape
    dtype: DType
    role: Role = "activation"

    @property
    def num_elements(self) -> int:
        """Product of the shape."""
        return self.shape[0] * self.shape[1] * self.shape[2]

    @property
    def num_bytes(self) -> int:
        """Bytes without alignment; bits are packed."""
        return (self.num_elements * _BITS[self.dtype] + 7) // 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One operation: which tensors it reads and which it writes is all that the planner needs to know."""

    READS: ClassVar[tuple[str, ...]] = ()
    WRITES: ClassVar[tuple[str, ...]] = ()

    name: str
    """Unique in its graph, and safe to print; made of the user's own names, so never pasted into C as it is."""

    def _named(self, attributes: tuple[str, ...]) -> tuple[str, ...]:
        names: list[str] = []
        for attribute in attributes:
            value = getattr(self, attribute)
            names += () if value is None else (value,) if isinstance(value, str) else value
        return tuple(names)

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the tensors it reads."""
        return self._named(self.READS)

    @property
    def writes(self) -> tuple[str, ...]:
        """Names of the tensors it writes."""
        return self._named(self.WRITES)


# --- what the front end gives -----------------------------------------------------------------------------------------

Activation = Literal["none", "relu", "relu6"]
"""What a convolution or an addition applies to its own output."""
Function = Literal["relu", "relu6", "sigmoid", "hard_sigmoid", "hard_swish"]
"""What is applied element by element by an op of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatOp(Op):
    """An operator of the user's model."""

    READS: ClassVar[tuple[str, ...]] = ("x",)
    WRITES: ClassVar[tuple[str, ...]] = ("y",)

    x: str
    y: str
    source: str
    """Where the user wrote it, for messages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conv(FloatOp):
    """Convolution; the weight constant is ``(out, kernel_h, kernel_w, in / groups)``.

    Where ``groups`` is the number of input and of output channels, it is a depthwise convolution.
    """

    weight: str
    bias: str | None
    stride: tuple[int, int]
    padding: Padding
    """Zeros."""
    groups: int = 1
    activation: Activation = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Add(FloatOp):
    """Sum of two tensors of one shape."""

    READS: ClassVar[tuple[str, ...]] = ("x", "z")
    z: str
    activation: Activation = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Multiply(FloatOp):
    """Product of two tensors: ``z`` has the shape of ``x``, or is 1 x 1 x channels (squeeze-and-excite)."""

    READS: ClassVar[tuple[str, ...]] = ("x", "z")
    z: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Concat(FloatOp):
    """Tensors of one height and width side by side in channels; ``x`` is the first, ``others`` follow in order."""

    READS: ClassVar[tuple[str, ...]] = ("x", "others")
    others: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool(FloatOp):
    """Largest or mean value of each window. An average counts the zeros of the padding, as torch does by default."""

    kind: Literal["average", "max"]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: Padding


@dataclass(frozen=True, slots=True, kw_only=True)
class GlobalAverage(FloatOp):
    """Mean over all pixels of each channel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Apply(FloatOp):
    """A function of one variable. ``canonicalize`` folds ReLU and ReLU6 into the Conv or Add before it where it can."""

    function: Function


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear(FloatOp):
    """Matrix and bias; the weight constant is ``(out, in)``. ``canonicalize`` turns it into a ``Conv``."""

    weight: str
    bias: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchNorm(FloatOp):
    """``x * factor + offset`` per channel, two constants. ``canonicalize`` folds it into the Conv before it, or makes
    it a depthwise convolution of width 1."""

    factor: str
    offset: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Flatten(FloatOp):
    """Channels, height, width (torch's order) to a vector. ``canonicalize`` removes it."""


@dataclass(frozen=True, slots=True)
class FloatGraph:
    """A model in real numbers. The last op writes the output. Canonical: no Linear, BatchNorm or Flatten is left."""

    input: str
    output: str
    tensors: Mapping[str, TensorType]
    ops: tuple[FloatOp, ...]
    constants: Mapping[str, npt.NDArray[np.float32]]


def not_negative(op: FloatOp, positive: Mapping[str, bool]) -> bool:
    """Whether no value that an op writes can be below 0, given the same of what it reads."""
    match op:
        case Conv() | Linear() | BatchNorm():
            return isinstance(op, Conv) and op.activation != "none"
        case Add():
            return op.activation != "none" or all(positive[name] for name in op.reads)
        case Apply():
            return op.function != "hard_swish"
        case _:
            return all(positive[name] for name in op.reads)


# --- one training step in integers ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerOp(Op):
    """An op that uses the constants, weights or biases of ``layer``."""

    layer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvForward(LayerOp):
    """``eft_conv_s8``, ``eft_grouped_s8`` or ``eft_depthwise_s8``."""

    READS: ClassVar[tuple[str, ...]] = ("x",)
    WRITES: ClassVar[tuple[str, ...]] = ("y", "mask", "bias")
    x: str
    y: str
    mask: str | None = None
    bias: str | None = None
    """Where the biases are put together, if the state holds only how far they have moved."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AddForward(LayerOp):
    """``eft_add_s8``."""

    READS: ClassVar[tuple[str, ...]] = ("x", "z")
    WRITES: ClassVar[tuple[str, ...]] = ("y", "mask")
    x: str
    z: str
    y: str
    mask: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MaxPoolForward(LayerOp):
    """``eft_max_pool_s8``."""

    READS: ClassVar[tuple[str, ...]] = ("x",)
    WRITES: ClassVar[tuple[str, ...]] = ("y",)
    x: str
    y: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TableForward(LayerOp):
    """``eft_table_s8``."""

    READS: ClassVar[tuple[str, ...]] = ("x",)
    WRITES: ClassVar[tuple[str, ...]] = ("y",)
    x: str
    y: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MultiplyForward(LayerOp):
    """``eft_multiply_s8``."""

    READS: ClassVar[tuple[str, ...]] = ("x", "z")
    WRITES: ClassVar[tuple[str, ...]] = ("y",)
    x: str
    z: str
    y: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ConcatForward(LayerOp):
    """``eft_concat_s8``, once for each of ``xs``."""

    READS: ClassVar[tuple[str, ...]] = ("xs",)
    WRITES: ClassVar[tuple[str, ...]] = ("y",)
    xs: tuple[str, ...]
    y: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AverageForward(LayerOp):
    """``eft_global_average_s8``."""

    READS: ClassVar[tuple[str, ...]] = ("x",)
    WRITES: ClassVar[tuple[str, ...]] = ("y",)
    x: str
    y: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadForward(LayerOp):
    """``eft_head_s8``."""

    READS: ClassVar[tuple[str, ...]] = ("x", "target")
    WRITES: ClassVar[tuple[str, ...]] = ("logits",)
    x: str
    logits: str
    target: str | None = None
    """What the outputs are compared with when the prediction ends: the input of an autoencoder."""


RowOp = ConvForward | AddForward | MaxPoolForward
"""What can be computed row by row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowStream(Op):
    """Ops that run interleaved, a row at a time, so that of what lies between them only a few rows exist.

    The tensors between them are rings: their height is the number of rows that are kept, row r is at r modulo that.
    """

    READS: ClassVar[tuple[str, ...]] = ("x",)
    WRITES: ClassVar[tuple[str, ...]] = ("y", "rings", "masks", "biases")
    x: str
    y: str
    rings: tuple[str, ...]
    masks: tuple[str, ...]
    biases: tuple[str, ...]
    ops: tuple[RowOp, ...]
    """In an order in which they could run whole."""
    schedule: tuple[int, ...]
    """Which op computes its next row, for every row of all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftmaxLoss(Op):
    """``eft_softmax_loss_s16``."""

    READS: ClassVar[tuple[str, ...]] = ("logits",)
    WRITES: ClassVar[tuple[str, ...]] = ("g",)
    logits: str
    g: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SquaredLoss(Op):
    """``eft_squared_loss_s16``; the target is the input."""

    READS: ClassVar[tuple[str, ...]] = ("logits", "target")
    WRITES: ClassVar[tuple[str, ...]] = ("g",)
    logits: str
    target: str
    g: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AverageGrad(LayerOp):
    """``eft_global_average_grad_s16``."""

    READS: ClassVar[tuple[str, ...]] = ("g", "mask")
    WRITES: ClassVar[tuple[str, ...]] = ("gx",)
    g: str
    mask: str | None
    gx: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvInputGrad(LayerOp):
    """``eft_conv_input_grad_s16`` and its like."""

    READS: ClassVar[tuple[str, ...]] = ("g", "mask")
    WRITES: ClassVar[tuple[str, ...]] = ("gx", "scratch")
    g: str
    mask: str | None
    gx: str
    scratch: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MaxPoolGrad(LayerOp):
    """``eft_max_pool_grad_s16``."""

    READS: ClassVar[tuple[str, ...]] = ("g", "x", "mask")
    WRITES: ClassVar[tuple[str, ...]] = ("gx",)
    g: str
    x: str
    mask: str | None
    gx: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TableGrad(LayerOp):
    """``eft_table_grad_s16``."""

    READS: ClassVar[tuple[str, ...]] = ("g", "x", "mask")
    WRITES: ClassVar[tuple[str, ...]] = ("gx",)
    g: str
    x: str
    mask: str | None
    gx: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MultiplyGrad(LayerOp):
    """``eft_multiply_grad_s16`` with the other factor, or ``eft_multiply_factor_grad_s16`` if ``gx`` has one pixel and
    the other factor more; that one needs scratch."""

    READS: ClassVar[tuple[str, ...]] = ("g", "other", "mask")
    WRITES: ClassVar[tuple[str, ...]] = ("gx", "scratch")
    g: str
    other: str
    mask: str | None
    gx: str
    scratch: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ConcatGrad(LayerOp):
    """``eft_concat_grad_s16``: the channels from ``first`` on."""

    READS: ClassVar[tuple[str, ...]] = ("g", "mask")
    WRITES: ClassVar[tuple[str, ...]] = ("gx",)
    g: str
    mask: str | None
    gx: str
    first: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientSum(Op):
    """``eft_gradient_sum_s16``: what reaches a tensor that several ops read, or one gradient through a mask."""

    READS: ClassVar[tuple[str, ...]] = ("a", "b", "mask")
    WRITES: ClassVar[tuple[str, ...]] = ("g",)
    a: str
    b: str | None
    mask: str | None
    g: str
    multiplier: int = 0
    shift: int = 0
    """One unit of ``b`` is ``multiplier * 2^-shift`` units of ``a``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightUpdate(LayerOp):
    """``eft_conv_update_master_s8`` and its like: gradient and update, no gradient buffer."""

    READS: ClassVar[tuple[str, ...]] = ("x", "g")
    WRITES: ClassVar[tuple[str, ...]] = ("scratch",)
    x: str
    g: str
    scratch: str | None
    """Only a depthwise layer's needs it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BiasUpdate(LayerOp):
    """``eft_bias_update_s32``."""

    READS: ClassVar[tuple[str, ...]] = ("g",)
    g: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Move(Op):
    """``eft_move``: the same values at another place, which may overlap the old one. Exponent and bits stay."""

    READS: ClassVar[tuple[str, ...]] = ("x",)
    WRITES: ClassVar[tuple[str, ...]] = ("y",)
    x: str
    y: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelTiles(Op):
    """Input gradients that run some channels at a time, so that the gradients between them never exist whole.

    Those are tiles: as high and wide as the gradient, with some of its channels. The first op makes a tile of a whole
    gradient, the next a tile of a tile, the last adds what a tile sends back to sums; these are its scratch, and become
    a gradient when all tiles have been added. A gradient can be used when its bits are known, those of all tiles: so
    there are as many rounds over the tiles as ops, and in each of them one op more runs than in the one before.
    """

    gradients: tuple[ConvInputGrad, ...]
    updates: tuple[WeightUpdate | BiasUpdate, ...]
    """From the tiles, each of which is used in the last round by all gradients first."""

    @property
    def tiles(self) -> tuple[str, ...]:
        """The gradients between."""
        return tuple(op.gx for op in self.gradients[:-1])

    @property
    def reads(self) -> tuple[str, ...]:
        """What comes from outside."""
        names = (name for op in (*self.gradients, *self.updates) for name in op.reads)
        return tuple(dict.fromkeys(name for name in names if name not in self.tiles))

    @property
    def writes(self) -> tuple[str, ...]:
        """Tiles, scratch and the gradient that is left."""
        return tuple(dict.fromkeys(name for op in (*self.gradients, *self.updates) for name in op.writes))


ForwardOp = RowOp | TableForward | MultiplyForward | ConcatForward | AverageForward | HeadForward
StepOp = (
    ForwardOp
    | RowStream
    | SoftmaxLoss
    | SquaredLoss
    | AverageGrad
    | ConvInputGrad
    | MaxPoolGrad
    | TableGrad
    | MultiplyGrad
    | ConcatGrad
    | GradientSum
    | Move
    | WeightUpdate
    | BiasUpdate
    | ChannelTiles
)


def inner_ops(op: StepOp) -> tuple[StepOp, ...]:
    """The ops that an op is made of, in an order in which they could run whole; most are made of themselves."""
    match op:
        case RowStream():
            return op.ops
        case ChannelTiles():
            return (*op.gradients, *op.updates)
        case _:
            return (op,)


def runs(op: StepOp) -> Iterator[StepOp]:
    """The same, each as often as all of it is computed."""
    if isinstance(op, ChannelTiles):
        for number in range(1, len(op.gradients)):
            yield from op.gradients[:number]
    yield from inner_ops(op)


@dataclass(frozen=True, slots=True)
class StepGraph:
    """One training step; the ops up to the ``HeadForward`` are the prediction."""

    input: str
    logits: str
    tensors: Mapping[str, TensorType]
    ops: tuple[StepOp, ...]
    copies_input: bool = True
    """The input is in the arena; else it is read where the caller has it."""

    @property
    def num_predict(self) -> int:
        """How many of the ops are the prediction."""
        return 1 + next(i for i, op in enumerate(self.ops) if isinstance(op, HeadForward))

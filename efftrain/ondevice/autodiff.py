"""The backward pass, made at compile time: from the forward ops to one graph of a whole training step."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from efftrain.ondevice.constants import AddConstants, ConvConstants, Layers, layer_of
from efftrain.ondevice.ir import (
    AddForward,
    AverageForward,
    AverageGrad,
    BiasUpdate,
    ConcatForward,
    ConcatGrad,
    ConvForward,
    ConvInputGrad,
    GradientSum,
    HeadForward,
    MaxPoolForward,
    MaxPoolGrad,
    MultiplyForward,
    MultiplyGrad,
    SoftmaxLoss,
    SquaredLoss,
    StepGraph,
    StepOp,
    TableForward,
    TableGrad,
    TensorType,
    WeightUpdate,
)
from efftrain.ondevice.quantize import Quantized, fix
from efftrain.ondevice.scheme import Trained
from efftrain.ondevice.state import Rounding, moves_biases
from efftrain.ondevice.verify import verify


def differentiate(quantized: Quantized, trained: Mapping[str, Trained], rounding: Rounding = "master") -> StepGraph:
    """Add loss, gradients of every tensor, and the updates of what is trained, in textbook order.

    The textbook order is all gradients first, from the loss to the input, then all updates; a mask is kept for every
    ReLU. The passes make it small.

    Args:
        quantized: The prediction.
        trained: By layer name.
        rounding: How weights move.
    """
    return _Differentiation(quantized, trained, rounding).run()


@dataclass
class _Differentiation:
    quantized: Quantized
    trained: Mapping[str, Trained]
    rounding: Rounding
    tensors: dict[str, TensorType] = field(default_factory=dict)
    backward: list[StepOp] = field(default_factory=list)
    updates: list[StepOp] = field(default_factory=list)
    masks: dict[str, str] = field(default_factory=dict)
    arrived: dict[str, list[str]] = field(default_factory=dict)
    """Gradients of each tensor, one a reader, in the order of ``Quantized.gradient_units``."""

    def run(self) -> StepGraph:
        forward, layers = self.quantized.graph, self.quantized.layers
        self.tensors = dict(forward.tensors)
        self.readers = Counter(name for op in forward.ops for name in op.reads)
        predict = [self._with_mask(op, layers) for op in forward.ops]
        loss = self._gradient(forward.logits, "loss.grad")
        self.arrived[forward.logits] = [loss]
        if self.quantized.loss == "cross_entropy":
            self.backward.append(SoftmaxLoss(name="loss", logits=forward.logits, g=loss))
        else:
            self.backward.append(SquaredLoss(name="loss", logits=forward.logits, target=forward.input, g=loss))
        for op in reversed(forward.ops):
            self._differentiate(op)
        ops = (*predict, *self.backward, *self.updates)
        used = {name for op in ops for name in (*op.reads, *op.writes)} | {forward.input}
        tensors = {name: tensor for name, tensor in self.tensors.items() if name in used}
        graph = replace(forward, tensors=tensors, ops=ops)
        verify(graph)
        return graph

    def _with_mask(self, op: StepOp, layers: Layers) -> StepOp:
        if isinstance(op, ConvForward | AddForward):
            layer = layers[op.layer]
            assert isinstance(layer, ConvConstants | AddConstants), f"{op.layer} has no activation"
            if isinstance(op, ConvForward) and isinstance(layer, ConvConstants) and self._moves_biases(layer):
                op = replace(op, bias=self._scratch(f"{op.name}.bias", layer.shape.out_c))
            if layer.masked:
                mask = self.masks[op.y] = f"{op.y}.mask"
                self.tensors[mask] = TensorType(self.tensors[op.y].shape, "bit", "mask")
                return replace(op, mask=mask)
        return op

    def _moves_biases(self, layer: ConvConstants) -> bool:
        """Whether the state holds only how far the biases of a layer have moved."""
        return self.trained.get(layer.name, Trained()).bias and moves_biases(layer, self.rounding)

    def _differentiate(self, op: StepOp) -> None:
        match op:
            case ConvForward(y=y) | HeadForward(logits=y):
                g = self._settled(y)
                self._update(op.name, op.layer, op.x, g)
                if (gx := self._arriving(op.x)) is not None:
                    scratch = self._scratch(f"{op.name}.input_grad", self.tensors[op.x].shape[2])
                    mask = self._mask(op.x)
                    name = f"{op.name}.input_grad"
                    self.backward.append(
                        ConvInputGrad(name=name, layer=op.layer, g=g, mask=mask, gx=gx, scratch=scratch)
                    )
            case AddForward():
                g = self._settled(op.y)
                for name in op.reads:
                    if name != self.quantized.graph.input:
                        self.arrived.setdefault(name, []).append(g)
            case AverageForward() | MaxPoolForward() | TableForward():
                g = self._settled(op.y)
                if (gx := self._arriving(op.x)) is None:
                    return
                name, mask = f"{op.name}.input_grad", self._mask(op.x)
                if isinstance(op, AverageForward):
                    self.backward.append(AverageGrad(name=name, layer=op.layer, g=g, mask=mask, gx=gx))
                elif isinstance(op, MaxPoolForward):
                    self.backward.append(MaxPoolGrad(name=name, layer=op.layer, g=g, x=op.x, mask=mask, gx=gx))
                else:
                    self.backward.append(TableGrad(name=name, layer=op.layer, g=g, x=op.x, mask=mask, gx=gx))
            case MultiplyForward():
                g = self._settled(op.y)
                self._factor(op, op.x, op.z, g, "x")
                self._factor(op, op.z, op.x, g, "z")
            case ConcatForward():
                g, first = self._settled(op.y), 0
                for number, x in enumerate(op.xs):
                    if (gx := self._arriving(x)) is not None:
                        name = f"{op.name}.input_grad{number}"
                        self.backward.append(
                            ConcatGrad(name=name, layer=op.layer, g=g, mask=self._mask(x), gx=gx, first=first)
                        )
                    first += self.tensors[x].shape[2]
            case _:
                raise AssertionError(f"{op.name} is not a forward op")

    def _factor(self, op: MultiplyForward, tensor: str, other: str, g: str, label: str) -> None:
        """The gradient of one factor of a product."""
        if (gx := self._arriving(tensor)) is None:
            return
        name = f"{op.name}.{label}_grad"
        summed = self.tensors[tensor].num_elements < self.tensors[other].num_elements
        scratch = self._scratch(name, self.tensors[tensor].shape[2]) if summed else None
        mask = self._mask(tensor)
        self.backward.append(
            MultiplyGrad(name=name, layer=op.layer, g=g, other=other, mask=mask, gx=gx, scratch=scratch)
        )

    def _settled(self, tensor: str) -> str:
        """The one gradient of a tensor whose readers are all done, masked."""
        first, *others = self.arrived[tensor]
        mask = self.masks.get(tensor)
        # A gradient that an addition passed on has not met this tensor's mask; one made for this tensor alone has.
        own = first == f"{tensor}.grad" and not others
        if own or (mask is None and not others):
            return first
        units = self.quantized.gradient_units[tensor]
        if not others:
            return self._sum(tensor, f"{tensor}.grad", first, None, mask, 1.0)
        g = first
        for index, other in enumerate(others):
            last = index == len(others) - 1
            name = f"{tensor}.grad" if last else f"{tensor}.grad.sum{index}"
            g = self._sum(tensor, name, g, other, mask if last else None, units[index + 1] / units[0])
        return g

    def _sum(self, tensor: str, g: str, a: str, b: str | None, mask: str | None, ratio: float) -> str:
        factors = fix(np.array([ratio]))
        self._gradient(tensor, g)
        self.backward.append(
            GradientSum(
                name=f"{g}.sum",
                a=a,
                b=b,
                mask=mask,
                g=g,
                multiplier=int(factors.multiplier[0]) if b else 0,
                shift=int(factors.shift[0]) if b else 0,
            )
        )
        return g

    def _arriving(self, tensor: str) -> str | None:
        """The name of a new gradient of a tensor; ``None`` for the input, which needs none."""
        if tensor == self.quantized.graph.input:
            return None
        arrived = self.arrived.setdefault(tensor, [])
        name = f"{tensor}.grad" if self.readers[tensor] == 1 else f"{tensor}.grad.{len(arrived)}"
        arrived.append(self._gradient(tensor, name))
        return name

    def _mask(self, tensor: str) -> str | None:
        """The mask that a gradient meets where it is made: only if it is the only one of its tensor."""
        return self.masks.get(tensor) if self.readers[tensor] == 1 else None

    def _gradient(self, tensor: str, name: str) -> str:
        self.tensors[name] = TensorType(self.tensors[tensor].shape, "s16", "gradient")
        return name

    def _scratch(self, op: str, elements: int) -> str:
        name = f"{op}.scratch"
        self.tensors[name] = TensorType((1, 1, elements), "s32", "scratch")
        return name

    def _update(self, name: str, layer: str, x: str, g: str) -> None:
        learns = self.trained.get(layer, Trained())
        if learns.bias:
            self.updates.append(BiasUpdate(name=f"{name}.bias_update", layer=layer, g=g))
        if learns.channels:
            constants = layer_of(self.quantized.layers, layer, ConvConstants)
            scratch = self._scratch(f"{name}.weight_update", learns.channels) if constants.depthwise else None
            self.updates.append(WeightUpdate(name=f"{name}.weight_update", layer=layer, x=x, g=g, scratch=scratch))

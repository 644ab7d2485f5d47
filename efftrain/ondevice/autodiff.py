"""The backward pass, made at compile time: from the forward ops to one graph of a whole training step."""

from collections.abc import Mapping
from dataclasses import replace

from efftrain.ondevice.ir import (
    AverageForward,
    AverageGrad,
    BiasUpdate,
    ConvForward,
    ConvInputGrad,
    HeadForward,
    SoftmaxLoss,
    StepGraph,
    StepOp,
    TensorType,
    WeightUpdate,
    verify,
)
from efftrain.ondevice.scheme import Trained


def differentiate(forward: StepGraph, trained: Mapping[str, Trained]) -> StepGraph:
    """Add loss, gradients of every tensor, and the updates of what is trained, in textbook order.

    The textbook order is all gradients first, from the loss to the input, then all updates; a mask is kept for every
    convolution. The passes make it small.

    Args:
        forward: The prediction, from ``quantize``.
        trained: By layer name.
    """
    tensors = dict(forward.tensors)
    gradient_of = {forward.logits: "loss.grad"}
    tensors["loss.grad"] = TensorType(tensors[forward.logits].shape, "s16", "gradient")
    predict: list[StepOp] = []
    masks: dict[str, str] = {}
    for op in forward.ops:
        if isinstance(op, ConvForward):
            masks[op.y] = f"{op.y}.mask"
            tensors[masks[op.y]] = TensorType(tensors[op.y].shape, "bit", "mask")
            op = replace(op, mask=masks[op.y])
        predict.append(op)
    backward: list[StepOp] = [SoftmaxLoss(name="loss", logits=forward.logits, g="loss.grad")]
    updates: list[StepOp] = []
    for op in reversed(forward.ops):
        match op:
            case ConvForward(y=y) | HeadForward(logits=y) | AverageForward(y=y):
                g = gradient_of[y]
            case _:
                raise AssertionError(f"{op.name} is not a forward op")
        if not isinstance(op, AverageForward):
            learns = trained[op.layer]
            if learns.bias:
                updates.append(BiasUpdate(name=f"{op.name}.bias_update", layer=op.layer, g=g))
            if learns.channels:
                scratch = f"{op.name}.weight_update.scratch"
                tensors[scratch] = TensorType((1, 1, learns.channels), "s32", "scratch")
                updates.append(
                    WeightUpdate(name=f"{op.name}.weight_update", layer=op.layer, x=op.x, g=g, scratch=scratch)
                )
        if op.x == forward.input:
            continue
        gx = gradient_of[op.x] = f"{op.x}.grad"
        tensors[gx] = TensorType(tensors[op.x].shape, "s16", "gradient")
        mask = masks.get(op.x)
        if isinstance(op, AverageForward):
            backward.append(AverageGrad(name=f"{op.name}.input_grad", layer=op.layer, g=g, mask=mask, gx=gx))
        else:
            scratch = f"{op.name}.input_grad.scratch"
            tensors[scratch] = TensorType((1, 1, tensors[op.x].shape[2]), "s32", "scratch")
            backward.append(
                ConvInputGrad(name=f"{op.name}.input_grad", layer=op.layer, g=g, mask=mask, gx=gx, scratch=scratch)
            )
    used = {name for op in (*predict, *backward, *updates) for name in (*op.reads, *op.writes)} | {forward.input}
    tensors = {name: tensor for name, tensor in tensors.items() if name in used}
    graph = StepGraph(forward.input, forward.logits, tensors, (*predict, *backward, *updates))
    verify(graph)
    return graph

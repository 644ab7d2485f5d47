"""Which channels of a layer learn: by rewriting the model, so that every back end trains the first inputs of a layer.

To train others than the first, the channels of a tensor are put in another order, in all that write or read them. To
train some outputs alone, a layer becomes two, one that learns and one that does not, whose outputs are put side by
side. Either is the same function, and a program like any other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from efftrain.errors import ConfigError
from efftrain.ondevice.ir import (
    Add,
    Apply,
    Concat,
    Conv,
    FloatGraph,
    FloatOp,
    GlobalAverage,
    Multiply,
    Pool,
)
from efftrain.ondevice.scheme import Layer, Scheme, Trained, choosing, resolve

Order = npt.NDArray[np.intp]
Array = npt.NDArray[np.float32]


def apply_scheme(graph: FloatGraph, scheme: Scheme) -> tuple[FloatGraph, dict[str, Trained]]:
    """What a scheme trains of a model, which is rewritten so that it is the first input channels of each layer.

    Args:
        graph: A canonical graph.
        scheme: Which parameters learn.

    Returns:
        A graph of the same function, and what learns of each of its layers with weights.

    Raises:
        ConfigError: The scheme does not fit the model.
    """
    layers = [_layer(op, graph) for op in graph.ops if isinstance(op, Conv)]
    trained = resolve(scheme, layers)
    if chosen := choosing(scheme, layers):
        of_outputs = {
            layer.name: trained[layer.name].outputs > 0
            for layer in layers
            if trained[layer.name].outputs or 0 < trained[layer.name].channels < layer.in_channels
        }
        first = {name: of_outputs.pop(name) for name in of_outputs.keys() - chosen}
        graph = largest_first(graph, of_outputs, first)
    return part_outputs(graph, trained)


def _layer(op: Conv, graph: FloatGraph) -> Layer:
    outputs, _, _, inputs = graph.constants[op.weight].shape
    if _is_depthwise(op, graph):
        return Layer(op.name, outputs, outputs, op.bias is not None, depthwise=True)
    return Layer(op.name, inputs, outputs, op.bias is not None, op.groups)


def part_outputs(graph: FloatGraph, trained: Mapping[str, Trained]) -> tuple[FloatGraph, dict[str, Trained]]:
    """Make two layers, ``NAME.learns`` and ``NAME.rest``, of each that trains some of its outputs alone.

    Args:
        graph: A canonical graph.
        trained: What learns of each layer with weights.

    Returns:
        A graph of the same function, and what learns of its layers: all outputs, or none.
    """
    constants, tensors = dict(graph.constants), dict(graph.tensors)
    ops: list[FloatOp] = []
    learns: dict[str, Trained] = {}
    for op in graph.ops:
        if not isinstance(op, Conv) or not (count := trained[op.name].outputs):
            ops.append(op)
            if isinstance(op, Conv):
                learns[op.name] = trained[op.name]
            continue
        height, width, channels = tensors[op.y].shape
        for part, rows in (("learns", slice(0, count)), ("rest", slice(count, channels))):
            name, y = f"{op.name}.{part}", f"{op.y}.{part}"
            tensors[y] = replace(tensors[op.y], shape=(height, width, len(range(channels)[rows])))
            part_op = replace(op, name=name, y=y, weight=f"{name}.weight")
            constants[part_op.weight] = constants[op.weight][rows]
            if op.bias is not None:
                part_op = replace(part_op, bias=f"{name}.bias")
                constants[f"{name}.bias"] = constants[op.bias][rows]
            ops.append(part_op)
            learns[name] = Trained(trained[op.name].channels if part == "learns" else 0, trained[op.name].bias)
        ops.append(Concat(name=op.name, x=f"{op.y}.learns", others=(f"{op.y}.rest",), y=op.y, source=op.source))
    return replace(graph, ops=tuple(ops), constants=_used(constants, ops), tensors=tensors), learns


def largest_first(graph: FloatGraph, layers: Mapping[str, bool], first: Mapping[str, bool] | None = None) -> FloatGraph:
    """Order channels by the norm of the weights that read or make them, the largest first.

    Layers that share channels, as those before and behind an addition do, get one order, by the sum of their squares.

    Args:
        graph: A canonical graph.
        layers: Names of the layers that choose, and whether among their outputs and not their inputs.
        first: The same of layers whose first channels learn, whichever these are.

    Returns:
        A graph of the same function. Constants in another order are called ``NAME.chosen``, so that nobody takes them
        for the module's.

    Raises:
        ConfigError: The order of the channels is given: the input's, those of a concatenation or of groups, or of
            ``first``.
    """
    same = _tied(graph)
    fixed = {same[name] for name in (graph.input, graph.output)}
    scores: dict[str, npt.NDArray[np.float64]] = {}
    for op in graph.ops:
        if isinstance(op, Concat) or (isinstance(op, Conv) and op.groups > 1 and not _is_depthwise(op, graph)):
            fixed |= {same[name] for name in (*op.reads, *op.writes)}
        if op.name in (first or {}):
            fixed.add(same[op.y if (first or {})[op.name] else op.x])
    for op in graph.ops:
        if not isinstance(op, Conv) or op.name not in layers:
            continue
        tensor = same[op.y if layers[op.name] else op.x]
        if tensor in fixed:
            raise ConfigError(
                f"layer {op.name!r} cannot choose the largest of its channels: they are the input's, or of a "
                'concatenation or of groups, or another layer learns the first of them. Use choose = "first".'
            )
        squares = graph.constants[op.weight].astype(np.float64) ** 2
        by_row = layers[op.name] or _is_depthwise(op, graph)
        scores[tensor] = scores.get(tensor, 0.0) + squares.sum((1, 2, 3) if by_row else (0, 1, 2))
    orders = {name: np.argsort(-score, kind="stable") for name, score in scores.items()}
    constants = dict(graph.constants)
    ops: list[FloatOp] = []
    for op in graph.ops:
        if isinstance(op, Conv):
            weight, bias = constants[op.weight], None if op.bias is None else constants[op.bias]
            if same[op.x] in orders and not _is_depthwise(op, graph):
                weight = weight[..., orders[same[op.x]]]
            if same[op.y] in orders:
                weight, bias = weight[orders[same[op.y]]], None if bias is None else bias[orders[same[op.y]]]
            if same[op.x] in orders or same[op.y] in orders:
                op = replace(op, weight=f"{op.weight}.chosen", bias=None if op.bias is None else f"{op.bias}.chosen")
                constants[op.weight] = np.ascontiguousarray(weight)
                if op.bias is not None and bias is not None:
                    constants[op.bias] = bias
        ops.append(op)
    return replace(graph, ops=tuple(ops), constants=_used(constants, ops))


def _used(constants: Mapping[str, Array], ops: Sequence[FloatOp]) -> dict[str, Array]:
    used = {name for op in ops if isinstance(op, Conv) for name in (op.weight, op.bias)}
    return {name: each for name, each in constants.items() if name in used}


def _is_depthwise(op: Conv, graph: FloatGraph) -> bool:
    return op.groups > 1 and op.groups == graph.tensors[op.x].shape[2] == graph.tensors[op.y].shape[2]


def _tied(graph: FloatGraph) -> dict[str, str]:
    """For each tensor one that stands for all whose channels must have one order."""
    same = {name: name for name in graph.tensors}

    def tie(*names: str) -> None:
        first, *others = (same[name] for name in names)
        for name, root in same.items():
            if root in others:
                same[name] = first

    for op in graph.ops:
        if isinstance(op, Add | Multiply):
            tie(op.x, op.z, op.y)
        elif isinstance(op, Apply | Pool | GlobalAverage) or (isinstance(op, Conv) and _is_depthwise(op, graph)):
            tie(op.x, op.y)
    return same

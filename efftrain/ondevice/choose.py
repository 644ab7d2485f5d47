"""Which channels of a layer learn: the compiler puts those that are chosen first, so that a share is always a prefix.

Every back end trains the first channels of a layer. To train others, those of the tensor that the layer reads are
put in another order, in all that write or read them: the same function, and a program like any other.
"""

from collections.abc import Collection
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from efftrain.errors import ConfigError
from efftrain.ondevice.ir import Add, Apply, Concat, Conv, FloatGraph, FloatOp, GlobalAverage, Multiply, Pool

Order = npt.NDArray[np.intp]


def largest_first(graph: FloatGraph, layers: Collection[str]) -> FloatGraph:
    """Order channels by the norm of the weights that read them, the largest first.

    Layers that read the same channels, as those behind an addition do, get one order, by the sum of their squares.

    Args:
        graph: A canonical graph.
        layers: Names of the layers that choose.

    Returns:
        A graph of the same function. Constants in another order are called ``NAME.chosen``, so that nobody takes them
        for the module's.

    Raises:
        ConfigError: A layer reads channels whose order is given: the input's, those of a concatenation, or of groups.
    """
    same = _tied(graph)
    fixed = {same[name] for name in (graph.input, graph.output)}
    scores: dict[str, npt.NDArray[np.float64]] = {}
    for op in graph.ops:
        if isinstance(op, Concat) or (isinstance(op, Conv) and op.groups > 1 and not _is_depthwise(op, graph)):
            fixed |= {same[name] for name in (*op.reads, *op.writes)}
    for op in graph.ops:
        if not isinstance(op, Conv) or op.name not in layers:
            continue
        if same[op.x] in fixed:
            raise ConfigError(
                f"layer {op.name!r} cannot choose the largest of its channels: they are the input's, or of a "
                'concatenation or of groups, and have an order. Use choose = "first".'
            )
        squares = graph.constants[op.weight].astype(np.float64) ** 2
        score = squares.sum((1, 2, 3)) if _is_depthwise(op, graph) else squares.sum((0, 1, 2))
        scores[same[op.x]] = scores.get(same[op.x], 0.0) + score
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
    used = {name for op in ops if isinstance(op, Conv) for name in (op.weight, op.bias)}
    return replace(graph, ops=tuple(ops), constants={name: each for name, each in constants.items() if name in used})


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

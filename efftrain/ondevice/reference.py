"""A canonical graph in real numbers: what calibration measures, and what the integers are compared with."""

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from efftrain.ondevice.ir import (
    Activation,
    Add,
    Apply,
    Concat,
    Conv,
    FloatGraph,
    Function,
    GlobalAverage,
    Multiply,
    Padding,
    Pool,
)


def run_float(graph: FloatGraph, batch: npt.NDArray[np.float32]) -> dict[str, Tensor]:
    """Every tensor of a canonical graph in fp32, with torch's own operators.

    Args:
        graph: From ``read_module``; any batch size may be run, the N below.
        batch: Inputs, ``(N, C, H, W)``; a signal has H = 1, a vector H = W = 1.

    Returns:
        By name, ``(N, C, H, W)``; the graph's output is ``(N, C, 1, 1)``.
    """
    values = {graph.input: torch.from_numpy(np.ascontiguousarray(batch))}
    with torch.no_grad():
        for op in graph.ops:
            x = values[op.x]
            match op:
                case Conv():
                    weight = torch.from_numpy(np.ascontiguousarray(graph.constants[op.weight].transpose(0, 3, 1, 2)))
                    bias = None if op.bias is None else torch.from_numpy(graph.constants[op.bias])
                    y = F.conv2d(bordered(x, op.padding, 0.0), weight, bias, op.stride, groups=op.groups)
                    values[op.y] = _activate(y, op.activation)
                case Add():
                    values[op.y] = _activate(x + values[op.z], op.activation)
                case Multiply():
                    values[op.y] = x * values[op.z]
                case Concat():
                    values[op.y] = torch.cat([x, *(values[name] for name in op.others)], 1)
                case Pool(kind="max"):
                    values[op.y] = F.max_pool2d(bordered(x, op.padding, -math.inf), op.kernel, op.stride)
                case Pool():
                    values[op.y] = F.avg_pool2d(x, op.kernel, op.stride, op.padding[:2])
                case GlobalAverage():
                    values[op.y] = x.mean((2, 3), keepdim=True)
                case Apply():
                    values[op.y] = apply_function(op.function, x)
                case _:
                    raise AssertionError(f"{op} is not canonical")
    return values


def bordered(x: Tensor, padding: Padding, value: float) -> Tensor:
    """The tensor with its border: torch's own padding is alike on both sides and at most half a window of a pool."""
    top, left, bottom, right = padding
    return F.pad(x, (left, right, top, bottom), value=value) if any(padding) else x


def _activate(x: Tensor, activation: Activation) -> Tensor:
    return x if activation == "none" else apply_function(activation, x)


def apply_function(function: Function, x: Tensor) -> Tensor:
    """A function of one variable, element by element."""
    match function:
        case "relu":
            return F.relu(x)
        case "relu6":
            return F.relu6(x)
        case "sigmoid":
            return torch.sigmoid(x)
        case "hard_sigmoid":
            return F.hardsigmoid(x)
        case "hard_swish":
            return F.hardswish(x)

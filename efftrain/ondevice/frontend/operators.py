"""What each PyTorch operator means in ``FloatGraph``, and what to write instead of those that have no meaning there.

A reader gets one call and returns the op that it becomes, or ``None`` if its output is its input.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from efftrain.errors import CompileError
from efftrain.ondevice.ir import (
    Add,
    Apply,
    BatchNorm,
    Concat,
    Conv,
    Flatten,
    FloatOp,
    Function,
    GlobalAverage,
    Linear,
    Multiply,
    Padding,
    Pool,
    Shape,
)

if TYPE_CHECKING:
    from efftrain.ondevice.frontend.reader import Reader

SUPPORTED = (
    "conv1d and conv2d (any groups, dilation 1), linear, batch norm, relu, relu6, sigmoid, hard-sigmoid, "
    "hard-swish, add and mul of two tensors, cat over channels, average and max pooling, adaptive pooling, mean and "
    "amax over all positions, zero padding before a convolution or max pool, flatten, dropout"
)
_REMEDIES = {
    "the loss contains it; return the logits": ("softmax", "log_softmax", "cross_entropy_loss", "nll_loss"),
    "use ReLU, ReLU6 or Hardswish": (
        *("gelu", "silu", "elu", "selu", "celu", "mish", "softplus", "leaky_relu", "prelu", "_prelu_kernel", "tanh"),
        *("rrelu", "exp", "threshold", "softsign"),
    ),
    "use BatchNorm, which is folded into the convolution before it": (
        *("layer_norm", "group_norm", "instance_norm", "rms_norm"),
    ),
    "use add with trained layers before it, or put the numbers into the preparation of the samples": (
        *("sub", "rsub", "div", "neg", "pow", "sqrt", "square", "abs"),
    ),
    "give samples as (channels, height, width) and keep that order": (
        *("permute", "transpose", "t", "movedim", "swapaxes", "numpy_T", "pixel_shuffle", "channel_shuffle"),
    ),
    "use one convolution for each part": (
        *("chunk", "split", "split_with_sizes", "slice", "select", "narrow", "index", "unbind"),
    ),
    "use a strided convolution or pooling to change the size; there is no way up": (
        *("conv_transpose1d", "conv_transpose2d", "upsample_nearest2d", "upsample_bilinear2d", "interpolate"),
    ),
    "use convolutions; attention and recurrence are not supported": (
        *("matmul", "bmm", "mm", "addmm", "scaled_dot_product_attention", "lstm", "gru", "rnn_tanh", "einsum"),
    ),
    "remove the parametrization of its weights first (torch.nn.utils.parametrize.remove_parametrizations)": (
        *("_weight_norm_interface", "_weight_norm", "norm_except_dim", "linalg_vector_norm"),
    ),
    "freeze layers with the update scheme": ("detach", "wrap_with_set_grad_enabled"),
    "use max_pool without indices": ("max_pool1d_with_indices", "max_pool2d_with_indices"),
}
_REMEDY = {operator: remedy for remedy, operators in _REMEDIES.items() for operator in operators}


@dataclass(frozen=True, slots=True)
class Call:
    """One operator of the traced graph."""

    target: str
    """``aten.conv2d.default``."""
    operator: str
    """``conv2d``; of an operator in place without the underscore."""
    arguments: Mapping[str, Any]
    """By the names of the operator's schema; those left out are missing."""
    before: tuple[int, ...]
    """Torch's shape of the first tensor."""
    after: tuple[int, ...]
    """Torch's shape of the result."""
    source: str
    name: str
    """Of the op to make."""
    x: str
    """First tensor."""
    y: str
    """The result."""

    @property
    def common(self) -> dict[str, Any]:
        """What every op has."""
        return {"name": self.name, "x": self.x, "y": self.y, "source": self.source}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pad(FloatOp):
    """A border of one value. ``canonicalize`` folds it into the convolutions and max pools that read it."""

    padding: Padding
    value: float
    """0, or minus infinity."""


def unsupported(call: Call, what: str = "", remedy: str = "") -> CompileError:
    """The refusal of a call: operator, place, what about it, and what to use instead."""
    remedy = remedy or _REMEDY.get(call.operator, "")
    advice = f"{remedy[0].upper()}{remedy[1:]}." if remedy else f"Supported: {SUPPORTED}."
    about = f" {what}" if what else ""
    return CompileError(f"operator {call.target} at {call.source}{about} is not supported. {advice}")


def shape_of(shape: Sequence[int]) -> Shape:
    """Torch's (batch, channels, ...) to ours."""
    if len(shape) == 4:
        return int(shape[2]), int(shape[3]), int(shape[1])
    if len(shape) == 3:
        return 1, int(shape[2]), int(shape[1])
    if len(shape) == 2:
        return 1, 1, int(shape[1])
    raise CompileError(
        f"a tensor of shape {tuple(shape)} is not supported; it must have a batch, channels and up to two more "
        "dimensions"
    )


def _pair(value: Any, dims: int, missing: int) -> tuple[int, int]:
    """The setting of a 1-D or 2-D layer as (vertical, horizontal)."""
    values = [int(v) for v in value] if isinstance(value, Sequence) else [int(value)]
    if len(values) == 1:
        values *= dims
    return (missing, values[0]) if dims == 1 else (values[0], values[1])


def _both_sides(value: Any, dims: int) -> Padding:
    return (*_pair(value, dims, 0), *_pair(value, dims, 0))


# --- layers with weights ----------------------------------------------------------------------------------------------


def _conv(reader: "Reader", call: Call) -> FloatOp:
    value = reader.parameter(call.arguments["weight"], call)
    dims = value.ndim - 2
    _check_batched(call, dims)
    if _pair(call.arguments.get("dilation", 1), dims, 1) != (1, 1):
        raise unsupported(
            call, "with dilation", "Use dilation=1 and a larger kernel, a stride or one more layer to see as far"
        )
    groups = int(call.arguments.get("groups", 1))
    padding = call.arguments.get("padding", 0)
    kernel_h, kernel_w = _pair(value.shape[2:], dims, 1)
    around: Padding
    if padding == "same":
        # Torch puts the odd one behind.
        around = ((kernel_h - 1) // 2, (kernel_w - 1) // 2, kernel_h // 2, kernel_w // 2)
    else:
        around = _both_sides(0 if padding == "valid" else padding, dims)
    value = value[:, :, None, :] if dims == 1 else value
    return Conv(
        **call.common,
        weight=reader.keep(call, "weight", value.transpose(0, 2, 3, 1)),
        bias=_bias(reader, call),
        stride=_pair(call.arguments.get("stride", 1), dims, 1),
        padding=around,
        groups=groups,
    )


def _bias(reader: "Reader", call: Call) -> str | None:
    bias = call.arguments.get("bias")
    return None if bias is None else reader.keep(call, "bias", reader.parameter(bias, call))


def _check_batched(call: Call, dims: int) -> None:
    if len(call.before) != dims + 2:
        raise unsupported(
            call, f"on a tensor of shape {call.before}", f"Give it {dims + 2} dimensions: batch, channels, positions"
        )


def _linear(reader: "Reader", call: Call) -> FloatOp:
    if len(call.before) != 2:
        raise CompileError(
            f"linear at {call.source} acts on a tensor of shape {call.before}, not on a vector. Flatten it first, or "
            "use a convolution of width 1."
        )
    weight = reader.keep(call, "weight", reader.parameter(call.arguments["weight"], call))
    return Linear(**call.common, weight=weight, bias=_bias(reader, call))


def _batch_norm(reader: "Reader", call: Call) -> FloatOp:
    mean, variance = call.arguments.get("running_mean"), call.arguments.get("running_var")
    if call.arguments.get("training") or mean is None or variance is None:
        raise unsupported(
            call, "without running statistics", "Use track_running_stats=True: they are folded into the weights"
        )
    variances = reader.constant(variance, call).astype(np.float64)
    if (variances < 0).any():
        raise CompileError(f"the batch norm at {call.source} has negative variances; train it again before compiling")
    factor = 1 / np.sqrt(variances + float(call.arguments.get("eps", 1e-5)))
    weight, bias = call.arguments.get("weight"), call.arguments.get("bias")
    if weight is not None:
        factor *= reader.parameter(weight, call)
    offset = -factor * reader.constant(mean, call)
    if bias is not None:
        offset += reader.parameter(bias, call)
    return BatchNorm(
        **call.common, factor=reader.keep(call, "factor", factor), offset=reader.keep(call, "offset", offset)
    )


# --- functions of one variable ----------------------------------------------------------------------------------------


def _function(function: Function) -> Callable[["Reader", Call], FloatOp]:
    def read(reader: "Reader", call: Call) -> FloatOp:
        return Apply(**call.common, function=function)

    return read


def _clamp(reader: "Reader", call: Call) -> FloatOp:
    low = call.arguments.get("min", call.arguments.get("min_val", -1 if call.operator == "hardtanh" else None))
    high = call.arguments.get("max", call.arguments.get("max_val", 1 if call.operator == "hardtanh" else None))
    numbers = all(value is None or isinstance(value, (int, float)) for value in (low, high))
    if numbers and low == 0 and (high is None or high == math.inf):
        return Apply(**call.common, function="relu")
    if numbers and (low, high) == (0, 6):
        return Apply(**call.common, function="relu6")
    raise unsupported(call, f"to [{low}, {high}]", "Use ReLU6, which clamps to [0, 6], or ReLU")


# --- two and more tensors ---------------------------------------------------------------------------------------------


def _add(reader: "Reader", call: Call) -> FloatOp | None:
    if call.arguments["other"] == 0 and isinstance(call.arguments["other"], int | float):
        return None  # Python's sum() starts with it
    z = reader.tensor(call.arguments["other"], call)
    if call.arguments.get("alpha", 1) != 1:
        raise unsupported(call, f"with alpha={call.arguments['alpha']}", "Use alpha=1")
    other = tuple(call.arguments["other"].meta["val"].shape)
    if other != call.before:
        raise unsupported(call, f"of shapes {call.before} and {other}", "Add tensors of one shape")
    return Add(**call.common, z=z)


def _multiply(reader: "Reader", call: Call) -> FloatOp:
    x, z = call.x, reader.tensor(call.arguments["other"], call)
    one, other = call.before, tuple(call.arguments["other"].meta["val"].shape)
    per_channel = (*call.after[:2], *[1] * (len(call.after) - 2))
    if one != call.after:
        x, z, one, other = z, x, other, one
    if one != call.after or other not in (one, per_channel):
        raise unsupported(
            call,
            f"of shapes {one} and {other}",
            "Multiply tensors of one shape, or a map by one value a channel: (1, channels, 1, 1)",
        )
    return Multiply(**{**call.common, "x": x}, z=z)


def _concat(reader: "Reader", call: Call) -> FloatOp | None:
    nodes = call.arguments["tensors"]
    names = [reader.tensor(node, call) for node in nodes]
    dim = int(call.arguments.get("dim", 0)) % len(call.after)
    if dim != 1 or any(len(node.meta["val"].shape) != len(call.after) for node in nodes):
        raise unsupported(call, f"over dimension {dim}", "Concatenate over channels, dim=1")
    return Concat(**call.common, others=tuple(names[1:])) if len(names) > 1 else None


# --- pooling, padding, shapes -----------------------------------------------------------------------------------------


def _pool(reader: "Reader", call: Call) -> FloatOp:
    dims = 1 if call.operator.endswith("1d") else 2
    _check_batched(call, dims)
    settings = call.arguments
    kernel = _pair(settings["kernel_size"], dims, 1)
    stride = _pair(settings.get("stride") or settings["kernel_size"], dims, 1)
    padding = _both_sides(settings.get("padding", 0), dims)
    if _pair(settings.get("dilation", 1), dims, 1) != (1, 1):
        raise unsupported(call, "with dilation", "Use dilation=1")
    size = shape_of(call.before)
    floor = [(n + 2 * p - k) // s + 1 for n, p, k, s in zip(size, padding, kernel, stride, strict=False)]
    if settings.get("ceil_mode", False) and tuple(floor) != shape_of(call.after)[:2]:
        raise unsupported(
            call,
            f"with ceil_mode=True, where it changes the size from {tuple(floor)} to {shape_of(call.after)[:2]},",
            "Use ceil_mode=False",
        )
    average = call.operator.startswith("avg")
    if average and any(padding) and not settings.get("count_include_pad", True):
        raise unsupported(call, "with padding and count_include_pad=False", "Use count_include_pad=True or no padding")
    if average and settings.get("divisor_override") not in (None, kernel[0] * kernel[1]):
        raise unsupported(call, "with divisor_override", "Leave it out")
    return Pool(**call.common, kind="average" if average else "max", kernel=kernel, stride=stride, padding=padding)


def _adaptive_pool(reader: "Reader", call: Call) -> FloatOp:
    _check_batched(call, 1 if call.operator.endswith("1d") else 2)
    (in_h, in_w, _), (out_h, out_w, _) = shape_of(call.before), shape_of(call.after)
    if in_h % out_h or in_w % out_w:
        raise unsupported(
            call,
            f"from {call.before[2:]} to {call.after[2:]}",
            "Use adaptive pooling to 1, or to sizes that divide those before",
        )
    kernel = (in_h // out_h, in_w // out_w)
    average = call.operator.startswith("adaptive_avg")
    return Pool(**call.common, kind="average" if average else "max", kernel=kernel, stride=kernel, padding=(0, 0, 0, 0))


def _over_all(reader: "Reader", call: Call) -> FloatOp:
    ndim, dims = len(call.before), call.arguments.get("dim")
    dims = [dims] if isinstance(dims, int) else dims
    wanted = set(range(2, ndim))
    if not dims or {int(dim) % ndim for dim in dims} != wanted:
        raise unsupported(
            call, f"over {dims}", f"Take it over all positions: dim={tuple(sorted(wanted))}" if wanted else ""
        )
    if call.operator == "mean":
        return GlobalAverage(**call.common)
    whole = shape_of(call.before)[:2]
    return Pool(**call.common, kind="max", kernel=whole, stride=whole, padding=(0, 0, 0, 0))


def _pad(reader: "Reader", call: Call) -> FloatOp:
    mode, value = call.arguments.get("mode", "constant"), call.arguments.get("value")
    if mode != "constant" or value not in (None, 0, -math.inf):
        raise unsupported(
            call,
            f"with mode {mode!r}" if mode != "constant" else f"with value {value}",
            "Pad with zeros before a convolution, with zeros after a ReLU or with -inf before a max pool",
        )
    amounts = [int(amount) for amount in call.arguments["pad"]]
    amounts += [0] * (4 - len(amounts))
    if any(amount < 0 for amount in amounts) or any(amounts[4:]) or any(amounts[2 * (len(call.before) - 2) :]):
        raise unsupported(call, f"by {tuple(amounts)}", "Pad height and width only, by 0 or more")
    left, right, top, bottom = amounts[:4]
    return Pad(**call.common, padding=(top, left, bottom, right), value=float(value or 0))


def _reshape(reader: "Reader", call: Call) -> FloatOp | None:
    if 2 <= len(call.after) <= 4 and shape_of(call.before) == shape_of(call.after):
        return None
    if len(call.after) != 2:
        raise unsupported(
            call,
            f"from {call.before} to {call.after}",
            "Only reshape to (batch, features), or add and remove dimensions of size 1; an autoencoder (loss "
            "squared_error) may bring its outputs into the shape of its input at last",
        )
    return Flatten(**call.common)


# --- operators that change nothing ------------------------------------------------------------------------------------


def _nothing(call: Call) -> None:
    """Its output is its input."""


def _dropout(call: Call) -> None:
    if call.arguments.get("train", False):
        raise unsupported(call, "in training mode", "Use nn.Dropout, which is off in evaluation mode")


def _to(call: Call) -> None:
    if call.arguments.get("dtype") not in (None, torch.float32):
        raise unsupported(call, f"to {call.arguments['dtype']}", "Keep tensors in float32")


IDENTITIES: Mapping[str, Callable[[Call], None]] = {
    "alias": _nothing,
    "clone": _nothing,
    "contiguous": _nothing,
    "dropout": _dropout,
    "feature_dropout": _dropout,
    "alpha_dropout": _dropout,
    "to": _to,
}
"""Operators whose output is their input, and what must hold for that."""

RESHAPES = frozenset(("flatten", "view", "reshape", "unflatten", "squeeze", "unsqueeze"))
"""Operators that give the values of their input another shape."""

VIEWS = frozenset(
    (
        *("alias", "contiguous", "dropout", "feature_dropout", "alpha_dropout", "to"),
        *RESHAPES,
    )
)
"""Operators whose output shares the memory of their input. See Note [in place]."""

READERS: Mapping[str, Callable[["Reader", Call], FloatOp | None]] = {
    "conv1d": _conv,
    "conv2d": _conv,
    "linear": _linear,
    "batch_norm": _batch_norm,
    "relu": _function("relu"),
    "relu6": _function("relu6"),
    "sigmoid": _function("sigmoid"),
    "hardsigmoid": _function("hard_sigmoid"),
    "hardswish": _function("hard_swish"),
    "hardtanh": _clamp,
    "clamp": _clamp,
    "clamp_min": _clamp,
    "add": _add,
    "mul": _multiply,
    "cat": _concat,
    "avg_pool1d": _pool,
    "avg_pool2d": _pool,
    "max_pool1d": _pool,
    "max_pool2d": _pool,
    "adaptive_avg_pool1d": _adaptive_pool,
    "adaptive_avg_pool2d": _adaptive_pool,
    "adaptive_max_pool1d": _adaptive_pool,
    "adaptive_max_pool2d": _adaptive_pool,
    "mean": _over_all,
    "amax": _over_all,
    "pad": _pad,
    "constant_pad_nd": _pad,
    **dict.fromkeys(sorted(RESHAPES), _reshape),
}

"""``torch.export`` of a plain module -> ``FloatGraph``.

What is taken: convolution (1-D and 2-D, dense), ReLU, global average, flatten, linear. Anything else is refused with
its place in the user's source, because a model that is silently changed would train to something else than was asked
for.
"""

import contextlib
import copy
import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from efftrain.errors import CompileError
from efftrain.ondevice.ir import (
    Conv,
    Flatten,
    FloatGraph,
    FloatOp,
    GlobalAverage,
    Linear,
    Relu,
    Shape,
    TensorType,
    verify,
)

SUPPORTED = (
    "conv1d and conv2d (groups=1, dilation=1), relu, adaptive average pooling to 1 or mean over all positions, "
    "flatten, linear"
)
MAX_TERMS = 33_156
"""Most products one output may sum: with |bias| <= 2^30 the int32 accumulator then cannot overflow."""


def read_module(model: nn.Module, example: Tensor) -> FloatGraph:
    """Trace a module and turn it into convolutions with optional ReLU and global averages.

    Args:
        model: Any module; not changed. It is traced in evaluation mode.
        example: One input, ``(1, C, L)`` or ``(1, C, H, W)``, fp32; of a larger batch the first is taken.

    Raises:
        CompileError: The module cannot be traced, or an operator is not supported.
    """
    if not isinstance(example, Tensor) or example.ndim not in (3, 4) or example.shape[0] < 1:
        raise CompileError(
            "the example must be a tensor of shape (1, channels, length) or (1, channels, height, width)"
        )
    model = copy.deepcopy(model).eval().to(device="cpu", dtype=torch.float32)
    try:
        with _quiet():
            exported = torch.export.export(model, (example[:1].detach().to(device="cpu", dtype=torch.float32),))
    except Exception as error:  # torch.export raises many types; none of them is an answer for a user
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CompileError(
            f"torch.export cannot trace the model: {first_line.rstrip('. ')}. Its forward must be free of "
            "control flow that depends on data, and take one tensor."
        ) from error
    graph = canonicalize(_Reader(exported).read())
    verify(graph)
    return graph


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Torch logs a failed trace over some twenty lines; our error says it in one."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def canonicalize(graph: FloatGraph) -> FloatGraph:
    """Fold ReLU into the convolution before it, and flatten and linear into a convolution that covers its input."""
    uses = Counter(name for op in graph.ops for name in op.reads)
    for name, count in uses.items():
        if count > 1:
            raise CompileError(f"{name} is used {count} times; branches are not supported yet, only chains of layers")
    constants = dict(graph.constants)
    tensors = {graph.input: graph.tensors[graph.input]}
    same: dict[str, str] = {}
    ops: list[FloatOp] = []
    for op in graph.ops:
        x = same.get(op.x, op.x)
        match op:
            case Flatten():
                same[op.y] = x
                continue
            case Relu():
                previous = ops[-1] if ops else None
                if not isinstance(previous, Conv):
                    raise CompileError(
                        f"relu at {op.source} does not follow a convolution or a linear layer. Move it there: after a "
                        "global average of ReLU outputs it changes nothing."
                    )
                ops[-1] = replace(previous, relu=True)
                same[op.y] = x
                continue
            case Linear():
                height, width, channels = tensors[x].shape
                weight = constants[op.weight].reshape(-1, channels, height, width)
                constants[op.weight] = np.ascontiguousarray(weight.transpose(0, 2, 3, 1))
                new: FloatOp = Conv(
                    name=op.name,
                    x=x,
                    y=op.y,
                    source=op.source,
                    weight=op.weight,
                    bias=op.bias,
                    stride=(1, 1),
                    padding=(0, 0),
                )
            case _:
                new = replace(op, x=x)
        if isinstance(new, Conv):
            terms = math.prod(constants[new.weight].shape[1:])
            if terms > MAX_TERMS:
                raise CompileError(
                    f"layer {new.name} at {new.source} sums {terms} products an output; at most {MAX_TERMS} fit "
                    f"an int32 "
                    "sum for certain. Put a pooling or a narrower layer before it."
                )
        tensors[new.y] = graph.tensors[new.y]
        ops.append(new)
    last = ops[-1] if ops else None
    if not isinstance(last, Conv) or last.relu or tensors[last.y].shape[:2] != (1, 1):
        raise CompileError(
            "the model must end in a linear layer without ReLU or softmax, whose outputs are the logits of the classes"
        )
    if tensors[last.y].shape[2] < 2:
        raise CompileError("the last layer has one output; softmax cross-entropy needs at least 2 classes")
    return FloatGraph(graph.input, last.y, tensors, tuple(ops), constants)


@dataclass
class _Reader:
    exported: Any
    tensors: dict[str, TensorType] = field(default_factory=dict)
    constants: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    ops: list[FloatOp] = field(default_factory=list)
    names: Counter[str] = field(default_factory=Counter)

    def read(self) -> FloatGraph:
        signature = self.exported.graph_signature
        parameters: Mapping[str, str] = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self.parameters = {key: self.exported.state_dict[name] for key, name in parameters.items()}
        values: dict[str, str] = {}
        source_input, output = "", ""
        for node in self.exported.graph.nodes:
            if node.op == "placeholder":
                if node.name in self.parameters:
                    continue
                if source_input:
                    raise CompileError("the model takes more than one tensor; only one input is supported")
                source_input = values[node.name] = "input"
                self.tensors["input"] = TensorType(_shape(node.meta["val"].shape), "f32", "input")
            elif node.op == "call_function":
                values[node.name] = self._operator(node, values)
            elif node.op == "output":
                results = node.args[0]
                if len(results) != 1:
                    raise CompileError(f"the model returns {len(results)} tensors; it must return the logits alone")
                output = values[results[0].name]
        return FloatGraph(source_input, output, self.tensors, tuple(self.ops), self.constants)

    def _operator(self, node: Any, values: Mapping[str, str]) -> str:
        target = str(node.target)
        operator = target.removeprefix("aten.").split(".")[0]
        arguments = _arguments(node)
        source = _place(node)
        if operator == "linear" and node.args[0].name in values and node.args[0].meta["val"].ndim != 2:
            raise CompileError(
                f"linear at {source} acts on a tensor of shape {tuple(node.args[0].meta['val'].shape)}, not on a "
                "vector. Flatten it first, or use a convolution of width 1."
            )
        handlers = {
            "conv1d": self._conv,
            "conv2d": self._conv,
            "linear": self._linear,
            "relu": self._relu,
            "relu_": self._relu,
            "adaptive_avg_pool1d": self._pool,
            "adaptive_avg_pool2d": self._pool,
            "mean": self._mean,
            "flatten": self._flatten,
            "view": self._flatten,
            "reshape": self._flatten,
            "squeeze": self._flatten,
        }
        if operator in ("dropout", "dropout_") and not arguments.get("train", False):
            return values[node.args[0].name]
        if operator in ("clone", "contiguous", "alias", "detach"):
            return values[node.args[0].name]
        read = arguments.get("input", arguments.get("self"))
        if operator not in handlers or not isinstance(read, torch.fx.Node) or read.name not in values:
            raise CompileError(f"operator {target} at {source} is not supported. Supported: {SUPPORTED}.")
        x = values[read.name]
        name = self._name(node, operator)
        y = f"{name}.out"
        op = handlers[operator](node, arguments, {"name": name, "x": x, "y": y, "source": source})
        self.tensors[y] = TensorType(self._shape_after(op, node), "f32")
        self.ops.append(op)
        return y

    def _shape_after(self, op: FloatOp, node: Any) -> Shape:
        shape = node.meta["val"].shape
        return (1, 1, int(shape[1])) if len(shape) == 2 else _shape(shape)

    def _name(self, node: Any, operator: str) -> str:
        module = _module(node) or operator
        self.names[module] += 1
        return module if self.names[module] == 1 else f"{module}#{self.names[module]}"

    def _parameter(self, node: Any, source: str) -> str:
        if not isinstance(node, torch.fx.Node) or node.name not in self.parameters:
            raise CompileError(
                f"the weights of the layer at {source} are computed, not parameters; that is not supported"
            )
        if node.name in self.constants:
            raise CompileError(f"the layer at {source} shares its parameters with another one; that is not supported")
        value = self.parameters[node.name].detach().to(torch.float32).numpy()
        if not np.isfinite(value).all():
            raise CompileError(
                f"the parameters of the layer at {source} hold inf or NaN; train it again before compiling"
            )
        self.constants[node.name] = value
        return str(node.name)

    def _conv(self, node: Any, arguments: Mapping[str, Any], common: dict[str, str]) -> FloatOp:
        source = common["source"]
        weight = self._parameter(arguments["weight"], source)
        value = self.constants[weight]
        dims = value.ndim - 2
        stride, dilation = _pair(arguments.get("stride", 1), dims, 1), _pair(arguments.get("dilation", 1), dims, 1)
        padding = arguments.get("padding", 0)
        kernel = _pair(value.shape[2:], dims, 1)
        if isinstance(padding, str):
            if padding == "same" and any(k % 2 == 0 for k in kernel):
                raise CompileError(
                    f"convolution at {source}: padding='same' with an even kernel; give the padding in numbers"
                )
            padding = [0] * dims if padding == "valid" else [(k - 1) // 2 for k in kernel][-dims:]
        if arguments.get("groups", 1) != 1:
            raise CompileError(
                f"convolution at {source} has groups={arguments['groups']}; only groups=1 is supported. "
                f"Supported: {SUPPORTED}."
            )
        if dilation != (1, 1):
            raise CompileError(
                f"convolution at {source} is dilated; only dilation=1 is supported. Supported: {SUPPORTED}."
            )
        if dims == 1:
            value = value[:, :, None, :]
        self.constants[weight] = np.ascontiguousarray(value.transpose(0, 2, 3, 1))
        return Conv(
            name=common["name"],
            x=common["x"],
            y=common["y"],
            source=source,
            weight=weight,
            bias=self._bias(arguments, source),
            stride=stride,
            padding=_pair(padding, dims, 0),
        )

    def _bias(self, arguments: Mapping[str, Any], source: str) -> str | None:
        return None if arguments.get("bias") is None else self._parameter(arguments["bias"], source)

    def _linear(self, node: Any, arguments: Mapping[str, Any], common: dict[str, str]) -> FloatOp:
        weight = self._parameter(arguments["weight"], common["source"])
        return Linear(**common, weight=weight, bias=self._bias(arguments, common["source"]))

    def _relu(self, node: Any, arguments: Mapping[str, Any], common: dict[str, str]) -> FloatOp:
        return Relu(**common)

    def _pool(self, node: Any, arguments: Mapping[str, Any], common: dict[str, str]) -> FloatOp:
        size = arguments["output_size"]
        if any(s != 1 for s in (size if isinstance(size, Sequence) else [size])):
            raise CompileError(
                f"adaptive average pooling to {size} at {common['source']}; only to 1 is supported. Supported: "
                f"{SUPPORTED}."
            )
        return GlobalAverage(**common)

    def _mean(self, node: Any, arguments: Mapping[str, Any], common: dict[str, str]) -> FloatOp:
        ndim = node.args[0].meta["val"].ndim
        dims = arguments.get("dim")
        wanted = set(range(2, ndim))
        if dims is None or {d % ndim for d in dims} != wanted or not wanted:
            raise CompileError(
                f"mean over {dims} at {common['source']}; only over all positions, {sorted(wanted)}. Supported: "
                f"{SUPPORTED}."
            )
        return GlobalAverage(**common)

    def _flatten(self, node: Any, arguments: Mapping[str, Any], common: dict[str, str]) -> FloatOp:
        before, after = node.args[0].meta["val"].shape, node.meta["val"].shape
        if len(after) != 2 or after[0] != before[0]:
            raise CompileError(
                f"reshape from {tuple(before)} to {tuple(after)} at {common['source']}; only to (batch, features) is "
                f"supported. Supported: {SUPPORTED}."
            )
        return Flatten(**common)


def _arguments(node: Any) -> dict[str, Any]:
    schema = node.target._schema.arguments if hasattr(node.target, "_schema") else []
    named = {argument.name: value for argument, value in zip(schema, node.args, strict=False)}
    return {**named, **node.kwargs}


def _shape(shape: Sequence[int]) -> Shape:
    """Torch's (batch, channels, ...) to ours."""
    if len(shape) == 4:
        return int(shape[2]), int(shape[3]), int(shape[1])
    if len(shape) == 3:
        return 1, int(shape[2]), int(shape[1])
    if len(shape) == 2:
        return 1, 1, int(shape[1])
    raise CompileError(f"a tensor of shape {tuple(shape)} is not supported; batch, channels and one or two more are")


def _pair(value: Any, dims: int, missing: int) -> tuple[int, int]:
    """The setting of a 1-D or 2-D layer as (vertical, horizontal)."""
    values = [int(v) for v in value] if isinstance(value, Sequence) else [int(value)]
    if len(values) == 1:
        values *= dims
    return (missing, values[0]) if dims == 1 else (values[0], values[1])


def _module(node: Any) -> str:
    """Dotted path of the module that the operator belongs to; empty for the model itself."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]).removeprefix("L['self'].") if stack else ""


def _place(node: Any) -> str:
    """Where the user wrote it: the last frame outside PyTorch if there is one, and the module's name."""
    place = ""
    torch_folder = str(Path(torch.__file__).parent)
    for line in (node.meta.get("stack_trace") or "").splitlines():
        line = line.strip()
        if line.startswith('File "') and torch_folder not in line:
            file, _, rest = line.removeprefix('File "').partition('"')
            place = f"{file}:{rest.removeprefix(', line ').split(',')[0]}"
    module = _module(node)
    return " ".join(filter(None, (place, f"(module {module})" if module else ""))) or f"node {node.name}"

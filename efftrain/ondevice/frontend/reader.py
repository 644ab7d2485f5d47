"""``torch.export`` of a plain module, walked operator by operator.

Anything that is not understood is refused with its place in the user's source, because a model that is silently
changed would train to something else than was asked for.

Note [in place]: an exported graph keeps ``relu_`` and ``+=`` as they were written. After such an operator every name
of the same memory means the new value, so ``Reader`` knows which values share memory. A view of another shape that is
read after its memory was changed is refused.
"""

import contextlib
import copy
import io
import logging
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping
from operator import getitem
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from efftrain.errors import CompileError
from efftrain.ondevice.frontend.canonicalize import canonicalize, channel_last_outputs
from efftrain.ondevice.frontend.operators import IDENTITIES, READERS, RESHAPES, VIEWS, Call, shape_of, unsupported
from efftrain.ondevice.ir import FloatGraph, FloatOp, TensorType
from efftrain.ondevice.verify import verify


def read_module(model: nn.Module, example: Tensor, *, autoencoder: bool = False) -> FloatGraph:
    """Trace a module and bring it into the canonical form of ``FloatGraph``.

    Args:
        model: Any module; not changed. It is traced in evaluation mode.
        example: One input, ``(1, features)``, ``(1, C, L)`` or ``(1, C, H, W)``, fp32; of a larger batch the first is
            taken.
        autoencoder: The outputs are compared with the input: they may be reshaped like it at the end, and are brought
            into its order, channel last.

    Raises:
        CompileError: The module cannot be traced, or an operator is not supported.
    """
    if not isinstance(example, Tensor) or example.ndim not in (2, 3, 4) or example.shape[0] < 1:
        raise CompileError(
            "the example must be a tensor of shape (1, channels, length) or (1, channels, height, width), or (1, "
            "features)"
        )
    model = copy.deepcopy(model).eval().to(device="cpu", dtype=torch.float32)
    try:
        with _quiet():
            exported = torch.export.export(model, (example[:1].detach().to(device="cpu", dtype=torch.float32),))
    except Exception as error:  # torch.export raises many types; none of them is an answer for a user
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        place = _users_line("".join(traceback.format_exception(error)))
        raise CompileError(
            f"torch.export cannot trace the model{f' at {place}' if place else ''}: {first_line.rstrip('. ')}. Its "
            "forward must be free of control flow that depends on data, and take one tensor."
        ) from error
    graph = canonicalize(Reader(exported, tuple(example[:1].shape) if autoencoder else ()).read())
    if autoencoder:
        graph = channel_last_outputs(graph)
    verify(graph)
    return graph


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Torch logs and prints a failed trace over some twenty lines; our error says it in one. Its warnings are about
    speed. What a user's ``forward`` prints while the trace succeeds is shown."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    printed = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(printed):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
    sys.stderr.write(printed.getvalue())


class Reader:
    """Turns one exported program into a ``FloatGraph`` that is not yet canonical.

    Args:
        exported: From ``torch.export.export`` in evaluation mode.
        image: Torch's shape into which the outputs may be brought at last; empty if they must be a vector.
    """

    def __init__(self, exported: Any, image: tuple[int, ...] = ()) -> None:
        self._exported, self._image = exported, image
        self._inputs = set(exported.graph_signature.user_inputs)
        self._parameters = _lifted(exported)
        self._tensors: dict[str, TensorType] = {}
        self._constants: dict[str, npt.NDArray[np.float32]] = {}
        self._storages: set[int] = set()
        self._ops: list[FloatOp] = []
        self._names: set[str] = set()
        self._values: dict[str, str] = {}  # node -> our tensor
        self._memory: dict[str, str] = {}  # node -> the node whose memory it shows. See Note [in place]
        self._stale: dict[str, str] = {}  # node -> where its memory was changed

    def read(self) -> FloatGraph:
        """The graph.

        Raises:
            CompileError: An operator is not supported, or the model takes or returns more than one tensor.
        """
        source_input, output = "", ""
        for node in self._exported.graph.nodes:
            if node.op == "placeholder" and node.name in self._inputs:
                if source_input:
                    raise CompileError("the model takes more than one tensor; only one input is supported")
                source_input = "input"
                self._define(node, source_input)
                self._tensors[source_input] = TensorType(shape_of(tuple(node.meta["val"].shape)), "f32", "input")
            elif node.op == "call_function":
                self._operator(node)
            elif node.op == "output":
                results = node.args[0]
                if len(results) != 1:
                    raise CompileError(f"the model returns {len(results)} tensors; it must return the logits alone")
                output = self._output(results[0])
        return FloatGraph(source_input, output, self._tensors, tuple(self._ops), self._constants)

    # --- what the readers of single operators use ---------------------------------------------------------------------

    def tensor(self, argument: object, call: Call) -> str:
        """The tensor that an argument means.

        Raises:
            CompileError: It is a number, a parameter or a constant, or was changed in place after it was viewed.
        """
        if not isinstance(argument, torch.fx.Node) or argument.name not in self._values:
            raise unsupported(
                call,
                "with a number, a parameter or a constant",
                "Put scale and offset into a BatchNorm or a convolution, or into the preparation of the samples",
            )
        if argument.name in self._stale:
            raise CompileError(
                f"{call.operator} at {call.source} reads a view of a tensor that {self._stale[argument.name]} changed "
                "in place. Use the form that is not in place (inplace=False, x = x + y)."
            )
        return self._values[argument.name]

    def constant(self, argument: object, call: Call) -> npt.NDArray[np.float32]:
        """A parameter or buffer as fp32.

        Raises:
            CompileError: It is computed in ``forward``, or holds inf or NaN.
        """
        if not isinstance(argument, torch.fx.Node) or argument.name not in self._parameters:
            raise CompileError(
                f"the weights of the layer at {call.source} are computed, not parameters; that is not supported. "
                "Store them in a Parameter of the layer."
            )
        value: npt.NDArray[np.float32] = self._parameters[argument.name].detach().to(torch.float32).numpy()
        if not np.isfinite(value).all():
            raise CompileError(
                f"the parameters of the layer at {call.source} hold inf or NaN; train it again before compiling"
            )
        return value

    def parameter(self, argument: Any, call: Call) -> npt.NDArray[np.float32]:
        """A parameter that no other layer uses: each layer learns its own on the device.

        Raises:
            CompileError: Another layer, or another call of this one, uses it too.
        """
        value = self.constant(argument, call)
        storage = self._parameters[argument.name].untyped_storage().data_ptr()
        if storage in self._storages:
            raise CompileError(
                f"the layer at {call.source} shares its parameters with another one; that is not supported. Give each "
                "layer parameters of its own."
            )
        self._storages.add(storage)
        return value

    def keep(self, call: Call, kind: str, value: npt.NDArray[Any]) -> str:
        """Store a constant of the layer and return its name."""
        name = f"{call.name}.{kind}"
        self._constants[name] = np.ascontiguousarray(value, np.float32)
        return name

    # --- walking the graph --------------------------------------------------------------------------------------------

    def _define(self, node: Any, tensor: str, memory: Any = None) -> None:
        self._values[node.name] = tensor
        self._memory[node.name] = node.name if memory is None else self._memory[memory.name]

    def _operator(self, node: Any) -> None:
        target = str(node.target)
        operator = target.removeprefix("aten.").split(".")[0]
        if operator == "_assert_tensor_metadata":
            return
        if node.target is getitem and node.args[0].name in self._values:
            if node.args[1] == 0:  # of a maximum and its index, which has no meaning on the device
                self._define(node, self._values[node.args[0].name], node.args[0])
            return
        in_place = operator.endswith("_") and not operator.endswith("__")
        operator = operator.rstrip("_") if in_place else operator
        arguments = _arguments(node)
        first: Any = arguments.get("input", arguments.get("self", arguments.get("tensors")))
        first = first[0] if isinstance(first, list | tuple) and first else first
        before, after = _shape(first), _shape(node)
        call = Call(target, operator, arguments, before, after, _place(node), "", "", "")
        if operator not in READERS and operator not in IDENTITIES:
            raise unsupported(call)
        x = self.tensor(first, call)
        if before[:1] != (1,) or after[:1] != (1,):
            raise unsupported(
                call, f"from {before} to {after}, a change of the batch,", "Keep dimension 0, the batch, as it is"
            )
        if self._is_image(node, call):
            y, op = x, None
        elif operator in IDENTITIES:
            IDENTITIES[operator](call)
            y, op = x, None
        else:
            name = self._name(node, operator)
            y = f"{name}.out"
            call = Call(target, operator, arguments, before, after, call.source, name, x, y)
            op = READERS[operator](self, call)
        if op is None:
            y = x
        else:
            self._tensors[y] = TensorType(shape_of(after), "f32")
            self._names.add(op.name)
            self._ops.append(op)
        contiguous = first.meta["val"].is_contiguous()
        is_view = operator in VIEWS and (contiguous or operator not in ("contiguous", "reshape", "flatten"))
        self._define(node, y, first if is_view or in_place else None)
        if in_place and y != x:
            self._changed(node, x, y, call.source)

    def _is_image(self, node: Any, call: Call) -> bool:
        """Whether it does nothing but bring the outputs of an autoencoder into the shape of its input."""
        last = all(user.op == "output" for user in node.users)
        return last and call.operator in RESHAPES and len(call.before) == 2 and call.after == self._image

    def _changed(self, node: Any, old: str, new: str, source: str) -> None:
        """See Note [in place]."""
        memory = self._memory[node.name]
        for name, other in self._memory.items():
            if other == memory and self._values[name] == old:
                self._values[name] = new
            elif other == memory and self._values[name] != new:
                self._stale[name] = source

    def _output(self, node: Any) -> str:
        if not isinstance(node, torch.fx.Node) or node.name not in self._values or node.name in self._stale:
            raise CompileError("the model must return the logits: a tensor that it computes from its input")
        return self._values[node.name]

    def _name(self, node: Any, operator: str) -> str:
        module = _module(node) or operator
        name, count = module, 1
        while name in self._names:
            count += 1
            name = f"{module}#{count}"
        return name


def _lifted(exported: Any) -> dict[str, Tensor]:
    """Parameters, buffers and constants by the placeholder that stands for them."""
    signature = exported.graph_signature
    stored: Mapping[str, str] = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    return {
        name: exported.state_dict[key] if key in exported.state_dict else exported.constants[key]
        for name, key in stored.items()
    }


def _arguments(node: Any) -> dict[str, Any]:
    schema = node.target._schema.arguments if hasattr(node.target, "_schema") else []
    named = {argument.name: value for argument, value in zip(schema, node.args, strict=False)}
    return {**named, **node.kwargs}


def _shape(node: Any) -> tuple[int, ...]:
    """Torch's shape of what a node makes, of several tensors the first; empty if that is no tensor."""
    value = node.meta.get("val") if isinstance(node, torch.fx.Node) else None
    value = value[0] if isinstance(value, tuple) and value else value
    return tuple(int(size) for size in value.shape) if isinstance(value, Tensor) else ()


def _module(node: Any) -> str:
    """Dotted path of the module that the operator belongs to; empty for the model itself."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]).removeprefix("L['self'].") if stack else ""


def _place(node: Any) -> str:
    """Where the user wrote it: the last frame outside PyTorch if there is one, and the module's name."""
    place = _users_line(node.meta.get("stack_trace") or "")
    module = _module(node)
    return " ".join(filter(None, (place, f"(module {module})" if module else ""))) or f"node {node.name}"


def _users_line(stack: str) -> str:
    """``file:line`` of the last frame of a printed stack that is neither PyTorch's nor of this file; may be empty."""
    place = ""
    others = (str(Path(torch.__file__).parent), __file__, 'File "<')  # the last one is code made by torch
    for line in map(str.strip, stack.splitlines()):
        if line.startswith('File "') and not any(other in line for other in others):
            file, _, rest = line.removeprefix('File "').partition('"')
            place = f"{file}:{rest.removeprefix(', line ').split(',')[0]}"
    return place

"""Runs a model once and writes down every operator: whose layer it is, its MACs, what it reads and what it writes.

Operators are seen below autograd, by a dispatch mode, so nothing that a ``forward`` calls by hand (attention, einsum, a
bare matrix product) is missed, and the backward pass is counted by the operators that it really runs: a first layer
needs no input gradient, a frozen layer no weight gradient.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten


@dataclass(frozen=True)
class Block:
    """One piece of memory that an operator touches."""

    storage: int
    """Same number, same memory: views share it."""
    elements: int
    itemsize: int
    is_float: bool
    is_state: bool
    """A parameter or buffer of the model."""


@dataclass(frozen=True)
class Operation:
    """One operator that ran. Views are kept too, for what they keep alive, and move nothing."""

    layer: str
    """Name of the innermost module whose forward was running, ``""`` for the model itself."""
    name: str
    macs: int
    reads: tuple[Block, ...]
    writes: tuple[Block, ...]
    is_view: bool


@dataclass
class Trace:
    """What one run did."""

    operations: list[Operation] = field(default_factory=list)
    output_shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Layer -> shape of its first output tensor."""
    input_storages: dict[int, Block] = field(default_factory=dict)
    output_storages: set[int] = field(default_factory=set)
    saved: list[tuple[str, Block]] = field(default_factory=list)
    """Layer and whole storage of each tensor kept for the backward pass; one entry a storage, none of parameters."""
    uncounted: set[str] = field(default_factory=set)
    """Operators that use a weight matrix and have no MAC formula."""


def trace_inference(model: nn.Module, inputs: tuple[Tensor, ...]) -> Trace:
    """One forward pass in evaluation mode, without autograd. The model is left as it was."""
    tracer = _Tracer(model)
    with _undisturbed(model), torch.no_grad():
        model.eval()
        tracer.forward(inputs)
    return tracer.trace


def trace_training(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Trace, Trace]:
    """One forward pass in training mode, and the backward pass to every parameter that requires a gradient.

    Returns:
        The traces of both passes; the second is empty when nothing requires a gradient. The model, its buffers, its
        gradients and torch's random state are left as they were.
    """
    tracer = _Tracer(model)
    with _undisturbed(model), torch.enable_grad():
        model.train()
        if inputs[0].ndim == 2 and len(inputs[0]) == 1:
            # One vector has no variance, so torch refuses it; as in inference the layer keeps and computes the same.
            for module in model.modules():
                if isinstance(module, nn.BatchNorm1d):
                    module.eval()
        outputs = tracer.forward(inputs)
        forward, tracer.trace = tracer.trace, Trace()
        tracer.backward(outputs)
    return forward, tracer.trace


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    # Fused attention and RNN kernels of the CPU hide their matrix products from us. Not mkldnn.flags(): it sets a TF32
    # option on its way, which warns on every CPU.
    torch.backends.mha.set_fastpath_enabled(False)
    onednn = torch.backends.mkldnn.set_flags(  # type: ignore[no-untyped-call]
        _enabled=False, _fp32_precision=None
    )[0]
    devices = {tensor.device.index for tensor in model.parameters() if tensor.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=sorted(devices)):
            yield
    finally:
        torch.backends.mkldnn.set_flags(_enabled=onednn, _fp32_precision=None)  # type: ignore[no-untyped-call]
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module, training in modes.items():
            module.training = training
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


class _Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model = model
        self.trace = Trace()
        self.layers: list[str] = [""]
        self.state = {_storage(tensor) for tensor in (*model.parameters(), *model.buffers())}
        # A storage that is freed could be followed by another at its address, so everything is kept until the end.
        self.alive: list[object] = []
        self.saved: set[int] = set()
        self.nodes: dict[torch.autograd.graph.Node, Any] = {}

    def forward(self, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        """Run the model, recording into ``self.trace``; returns the output tensors."""
        for tensor in inputs:
            self.trace.input_storages[_storage(tensor)] = self._block(tensor, whole=True)
        hooks = []
        for name, module in self.model.named_modules():
            if name:
                hooks += [
                    module.register_forward_pre_hook(self._enter(name), with_kwargs=True),
                    module.register_forward_hook(self._leave(name)),
                ]
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor), self:
                outputs = self.model(*inputs)
        finally:
            for hook in hooks:
                hook.remove()
        tensors = _tensors(outputs)
        self._claim_nodes(tensors, "")
        self.trace.output_storages = {_storage(tensor) for tensor in tensors}
        if tensors:
            self.trace.output_shapes[""] = tuple(tensors[0].shape)
        return tensors

    def backward(self, outputs: list[Tensor]) -> None:
        """Run the backward pass of ``forward``, recording into ``self.trace``."""
        wanted = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        sources = [output for output in outputs if output.requires_grad]
        if not wanted or not sources:
            return
        ones = [torch.ones_like(source) for source in sources]
        self.alive.append(ones)
        try:
            with self:
                # Not .backward(): the gradients that a user has accumulated are not ours to touch.
                self.alive.append(torch.autograd.grad(sources, wanted, ones, allow_unused=True))
        finally:
            for handle in self.nodes.values():
                handle.remove()
            self.nodes.clear()

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, kwargs: object) -> None:
            self._claim_nodes(_tensors((args, kwargs)), self.layers[-1])
            self.layers.append(name)

        return hook

    def _leave(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: object) -> None:
            tensors = _tensors(output)
            self._claim_nodes(tensors, name)
            self.layers.pop()
            if tensors:
                self.trace.output_shapes[name] = tuple(tensors[0].shape)

        return hook

    def _claim_nodes(self, tensors: list[Tensor], layer: str) -> None:
        """Give the autograd nodes behind ``tensors`` that nobody has yet to ``layer``, for the backward pass."""
        waiting = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
        while waiting:
            node = waiting.pop()
            if node in self.nodes:
                continue
            self.nodes[node] = node.register_prehook(self._node_starts(layer))
            waiting += [before for before, _ in node.next_functions if before is not None]

    def _node_starts(self, layer: str) -> Callable[[Any], None]:
        def hook(grads: object) -> None:
            self.layers = [layer]

        return hook

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = _storage(tensor)
        if storage not in self.state and storage not in self.saved:
            self.saved.add(storage)
            self.alive.append(tensor)
            self.trace.saved.append((self.layers[-1], self._block(tensor, whole=True)))
        return tensor

    def _block(self, tensor: Tensor, whole: bool = False) -> Block:
        storage = tensor.untyped_storage()
        available = storage.nbytes() // tensor.itemsize
        # An expanded tensor has more elements than memory.
        elements = available if whole else min(tensor.numel(), available)
        key = _storage(tensor)
        return Block(key, elements, tensor.itemsize, tensor.is_floating_point(), key in self.state)

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> object:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        inputs, outputs = _tensors((args, kwargs)), _tensors(result)
        self.alive += [inputs, outputs]
        packet = func.overloadpacket
        written = any(argument.alias_info and argument.alias_info.is_write for argument in func._schema.arguments)
        given = {_storage(tensor) for tensor in inputs}
        is_view = bool(outputs) and not written and all(_storage(tensor) in given for tensor in outputs)
        moves = not is_view and packet not in _ALLOCATIONS
        reads = tuple(self._block(tensor) for tensor in inputs)
        if packet is aten.embedding:
            # Rows are looked up; the table is not read.
            reads = (self._block(outputs[0]), *reads[1:])
        formula = _MACS.get(packet)
        if formula is None and moves and self._uses_weights(func, inputs):
            self.trace.uncounted.add(str(packet))
        self.trace.operations.append(
            Operation(
                layer=self.layers[-1],
                name=str(packet),
                macs=0 if formula is None else formula(args, kwargs, result),
                reads=reads,
                writes=tuple(self._block(tensor) for tensor in outputs),
                is_view=not moves,
            )
        )
        return cast(object, result)

    def _uses_weights(self, func: Any, inputs: list[Tensor]) -> bool:
        if torch.Tag.pointwise in func.tags or func.overloadpacket in _LOOKUPS:
            return False
        return any(tensor.dim() >= 2 and _storage(tensor) in self.state for tensor in inputs)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


# Formulas. Each is given the operator's arguments and result; one MAC is one multiplication and one addition.


def _matrix_product(first: int) -> Callable[..., int]:
    """``(..., m, k) @ (..., k, n)``, the factors at ``first`` and ``first + 1``."""
    return lambda args, kwargs, out: int(args[first].numel() * args[first + 1].shape[-1])


def _matrix_vector(first: int) -> Callable[..., int]:
    return lambda args, kwargs, out: int(args[first].numel())


def _convolution(args: Any, kwargs: Any, out: Any) -> int:
    inputs, weight, transposed = args[0], args[1], args[6]
    # Transposed, every input element meets a whole filter; else every output element does.
    return int((inputs if transposed else out).numel() * weight[0].numel())


def _convolution_backward(args: Any, kwargs: Any, out: Any) -> int:
    grad, inputs, weight, transposed, wanted = args[0], args[1], args[2], args[7], args[10]
    return int((inputs if transposed else grad).numel() * weight[0].numel()) * (int(wanted[0]) + int(wanted[1]))


def _attention(args: Any, kwargs: Any, out: Any) -> int:
    query, key, value = args[:3]
    pairs = query.shape[:-1].numel() * key.shape[-2]
    return int(pairs * (query.shape[-1] + value.shape[-1]))


def _attention_backward(args: Any, kwargs: Any, out: Any) -> int:
    """Scores once more, then the gradients of value, scores, query and key: five matrix products."""
    query, key, value = args[1:4]
    pairs = query.shape[:-1].numel() * key.shape[-2]
    return int(pairs * (3 * query.shape[-1] + 2 * value.shape[-1]))


_MACS: dict[Any, Callable[..., int]] = {
    aten.mm: _matrix_product(0),
    aten.bmm: _matrix_product(0),
    aten.addmm: _matrix_product(1),
    aten._addmm_activation: _matrix_product(1),
    aten.baddbmm: _matrix_product(1),
    aten.addbmm: _matrix_product(1),
    aten.linear: lambda args, kwargs, out: int(args[0].numel() * args[1].shape[0]),
    aten.mv: _matrix_vector(0),
    aten.addmv: _matrix_vector(1),
    aten.dot: _matrix_vector(0),
    aten.convolution: _convolution,
    aten._convolution: _convolution,
    aten.convolution_backward: _convolution_backward,
}
for _kind in ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention"):
    # torch writes the backward of the CPU kernel as ..._for_cpu_backward.
    for _name, _formula in ((_kind, _attention), (f"{_kind}_backward", _attention_backward)):
        if hasattr(aten, f"_scaled_dot_product_{_name}"):
            _MACS[getattr(aten, f"_scaled_dot_product_{_name}")] = _formula

_ALLOCATIONS = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}
_LOOKUPS = {aten.embedding, aten.embedding_dense_backward, aten.index, aten.index_select, aten.cat, aten.clone}

"""The graph of a plain model: which of its modules feed which. What the tensor and the pipeline axis are cut along."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from efftrain.errors import ConfigError

_COST_OF_ELEMENT = 8
"""An output element is written, read and read again in the backward pass: counted like so many FLOPs."""


@dataclass(frozen=True)
class NodeFacts:
    """What one node of a graph gives, found without computing it."""

    value: Any
    """A fake tensor, or whatever else it gives."""
    cost: float
    """FLOPs of its forward pass, and a share for every element it writes."""


def trace(model: nn.Module, opened: Collection[str] | None = None, closed: Collection[str] = ()) -> fx.Graph:
    """The order in which a model calls its parts.

    Args:
        model: Any module whose control flow does not depend on its input.
        opened: Names of modules to look into; the others are one node each. ``Sequential`` is opened, too. ``None``
            opens everything down to torch's own layers.
        closed: Names of modules that are one node whatever they are.

    Raises:
        ConfigError: It cannot be traced; with torch's reason.
    """
    tracer = _Tracer(opened, closed)
    try:
        return tracer.trace(model)
    except Exception as error:  # whatever a user's forward does with a value that stands for all values
        raise ConfigError(
            f"model {type(model).__name__} cannot be cut over a tensor or pipeline axis, its forward cannot be traced: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}. Write it without branches on "
            "values of the input, or set parallel.tensor=1 and parallel.pipeline=1"
        ) from error


def facts(model: nn.Module, graph: fx.Graph, inputs: Tensor, *, bf16: bool = False) -> dict[fx.Node, NodeFacts]:
    """Shapes, dtypes and costs of all nodes for one input.

    Args:
        model: That was traced.
        graph: From ``trace``.
        inputs: As the model takes them, any values.
        bf16: It runs under autocast.

    Raises:
        ConfigError: The model does not take them.
    """
    autocast = torch.autocast(inputs.device.type, torch.bfloat16, enabled=bf16)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad(), autocast, evaluating(model):
        run = _Costs(model, graph)
        try:
            run.run(mode.from_tensor(inputs))
        except Exception as error:
            raise ConfigError(
                f"model {type(model).__name__} does not take the example of shape {tuple(inputs.shape)} and dtype "
                f"{inputs.dtype}: {str(error).splitlines()[0]}"
            ) from error
    return run.found


@contextmanager
def evaluating(model: nn.Module, training: bool = False) -> Iterator[None]:
    """Every module in evaluation mode meanwhile, without dropout and running statistics; or all of them in training."""
    modes = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def uses(graph: fx.Graph, model: nn.Module) -> Iterator[tuple[fx.Node, str]]:
    """Every use of a parameter or buffer: the node, and the tensor's name of all its names (the first)."""
    names = {id(tensor): name for name, tensor in tensors(model)}
    for node in graph.nodes:
        if node.op == "call_module":
            for _, tensor in tensors(model.get_submodule(str(node.target))):
                yield node, names[id(tensor)]
        elif node.op == "get_attr":
            found = _attribute(model, str(node.target))
            if isinstance(found, Tensor) and id(found) in names:
                yield node, names[id(found)]


def part_of(model: nn.Module, names: Collection[str]) -> nn.Module:
    """A bare module that holds some parts of ``model`` under their own names. It is never called.

    Args:
        model: The whole. Its parts are shared, not copied.
        names: Of modules or of single parameters and buffers. They keep the order that they have in ``model``, so that
            the first name of a weight that layers share is the same.
    """
    places: dict[str, int] = {}
    for number, name in enumerate(model.state_dict(keep_vars=True)):
        for end in range(name.count(".") + 1):
            places.setdefault(name.rsplit(".", end)[0], number)
    root = nn.Module()
    for name in sorted(names, key=lambda name: (places.get(name, len(places)), name)):
        *path, last = name.split(".")
        place = root
        for step in path:
            if step not in place._modules:
                place.add_module(step, nn.Module())
            place = place.get_submodule(step)
        found = _attribute(model, name)
        if isinstance(found, nn.Parameter):
            place.register_parameter(last, found)
        elif isinstance(found, Tensor):
            place.register_buffer(last, found)
        else:
            place.add_module(last, found)
    return root


def tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers by name, each once."""
    yield from module.named_parameters()
    yield from module.named_buffers()


def _attribute(model: nn.Module, name: str) -> Any:
    path, _, last = name.rpartition(".")
    return getattr(model.get_submodule(path), last)


class _Tracer(fx.Tracer):
    def __init__(self, opened: Collection[str] | None, closed: Collection[str]) -> None:
        super().__init__()
        self._opened, self._closed = opened, closed

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        if name in self._closed:
            return True
        if isinstance(module, nn.Sequential):
            return False
        return super().is_leaf_module(module, name) if self._opened is None else name not in self._opened


class _Costs(fx.Interpreter):
    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        super().__init__(model, graph=graph, garbage_collect_values=False)
        self.found: dict[fx.Node, NodeFacts] = {}

    def run_node(self, n: fx.Node) -> Any:
        with FlopCounterMode(display=False) as counter:
            value = super().run_node(n)
        elements = value.numel() if isinstance(value, Tensor) and n.op != "get_attr" else 0
        self.found[n] = NodeFacts(value, counter.get_total_flops() + _COST_OF_ELEMENT * elements)
        return value

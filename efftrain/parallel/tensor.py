"""The tensor axis: which layers are divided, and how. Derived from the model's graph, and tried out before it is used.

A linear layer divided by *columns* gives each rank a part of the output features, one divided by *rows* takes a part of
the input features and adds up over the ranks; between the two nothing is sent (Shoeybi et al., Megatron-LM,
arXiv:1909.08053, section 3). So the graph is searched for linear layers whose features reach another linear layer
through nothing but element-wise work, or attention, which is independent by heads. Embeddings are divided by entries.
The last layer, if nothing but the loss comes after it, keeps its part of the classes on each rank and the loss is
computed there (*classes*).

What "independent by heads" means cannot be read off a graph for sure, so every plan is played through on the example,
all ranks in this process, and refused where the result is another.
"""

# T ranks of the tensor axis

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor, fx, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized

from efftrain.errors import ConfigError
from efftrain.parallel.graph import evaluating, facts, trace

Style: TypeAlias = Literal["columns", "rows", "entries", "classes", "gathered", "sequence", "whole"]
"""How a module is divided: ``gathered`` by columns, of which every rank gets all; ``whole`` is on every rank,
``sequence`` whole too but works on a part of the positions."""

STYLES: tuple[Style, ...] = ("columns", "rows", "entries", "classes", "gathered", "sequence", "whole")

_NORMS = (nn.LayerNorm, nn.RMSNorm)
_ELEMENTWISE = (nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Hardswish, nn.Dropout, nn.Identity)
_ELEMENTWISE_CALLS: tuple[Callable[..., Any], ...] = (
    F.relu, F.gelu, F.silu, F.dropout, torch.relu, torch.tanh, torch.sigmoid,
    operator.add, operator.mul, operator.truediv, operator.sub, operator.neg, torch.add, torch.mul,
)  # fmt: skip
_BY_HEADS: tuple[Callable[..., Any], ...] = (
    F.scaled_dot_product_attention, F.softmax, torch.softmax, torch.matmul, operator.matmul, torch.where,
)  # fmt: skip
_METHODS = (
    "relu", "tanh", "sigmoid", "unflatten", "flatten", "transpose", "permute", "contiguous", "reshape", "view",
    "softmax", "masked_fill", "mT",
)  # fmt: skip


@dataclass(frozen=True)
class TensorPlan:
    """How each module that is not on all ranks as a whole is divided."""

    styles: Mapping[str, Style]
    """Module name -> style."""
    together: tuple[frozenset[str], ...] = ()
    """Modules between which features are in parts: no pipeline stage may end there."""
    example: Tensor = field(default_factory=lambda: torch.empty(0), compare=False, repr=False)
    """A few inputs that the ranks try the divided model out on (``trial``)."""
    position_dims: Mapping[str, int] = field(default_factory=dict)
    """Module name -> dimension of positions in its output; empty unless positions are divided, too.
    Between the divided layers a rank holds a part of the positions only (Korthikanti et al., arXiv:2205.05198)."""

    @property
    def sequence(self) -> bool:
        """Whether positions are divided."""
        return bool(self.position_dims)

    @property
    def divides_classes(self) -> bool:
        """Whether the output of the model is in parts."""
        return "classes" in self.styles.values()

    def with_whole_output(self) -> "TensorPlan":
        """The same, but for a last layer whose parts all ranks get: any loss can be computed from that."""
        styles = {name: "gathered" if style == "classes" else style for name, style in self.styles.items()}
        return replace(self, styles=cast(dict[str, Style], styles))


def plan_tensor(
    model: nn.Module,
    example: Tensor,
    size: int,
    overrides: Mapping[str, str] | None = None,
    *,
    sequence: bool = False,
) -> TensorPlan:
    """Find out how to divide a model over ``size`` ranks, and that the result is right.

    Args:
        model: Float32, on one device; not changed.
        example: Inputs of at least one sample; real ones, since results are compared.
        size: ``T``.
        overrides: Module name -> style, for what is to be divided in another way than found.
        sequence: Divide the positions between the divided layers, too.

    Raises:
        ConfigError: Nothing can be divided, a size is not divisible, a name or style is unknown, or the divided model
            computes something else.
    """
    with evaluating(model):
        graph = trace(model)
    wanted = {name: _checked_override(model, name, style) for name, style in (overrides or {}).items()}
    kept_whole = frozenset(name for name, style in wanted.items() if style == "whole")
    values = {node: found.value for node, found in facts(model, graph, example).items()}
    derived, together = _derive(model, graph, values, size, kept_whole)
    styles = derived | wanted
    styles = {name: style for name, style in styles.items() if style != "whole"}
    if not styles:
        raise ConfigError(
            f"no layer of {type(model).__name__} can be divided by {size}: parallel.tensor={size} needs pairs of "
            "linear layers, or attention, with sizes that it divides. Set parallel.tensor=1 or name layers in "
            "parallel.tensor_styles"
        )
    _check_sizes(model, styles, size)
    dims: dict[str, int] = {}
    if sequence:
        styles |= _sequence(model, graph, styles, example, size)
        dims = {str(n.target): values[n].ndim - 2 for n in graph.nodes if str(n.target) in styles}
    found = TensorPlan(styles, tuple(together), example[:2].detach().clone(), dims)
    _try_out(model, graph, found, example, size)
    return found


def divide(model: nn.Module, plan: TensorPlan, mesh: DeviceMesh) -> None:
    """Divide the parameters of ``model``, in place, and make it exchange activations on the way.

    Args:
        model: The model, or a part of it that keeps the names.
        plan: From ``plan_tensor``.
        mesh: The tensor axis.
    """
    names = dict(model.named_modules())
    # In one order on all ranks: each layer is scattered from the first of them.
    styles = {
        name: _torch_style(style, plan.position_dims.get(name))
        for name, style in sorted(plan.styles.items())
        if name in names
    }
    if styles:
        parallelize_module(model, mesh, styles)


# Derivation -------------------------------------------------------------------------------------------------------


class _Conflict(Exception):
    """These linear layers cannot be divided by columns: their features meet something that needs them all."""

    def __init__(self, names: frozenset[str]) -> None:
        super().__init__(names)
        self.names = names


def _derive(
    model: nn.Module, graph: fx.Graph, values: Mapping[fx.Node, Any], size: int, refused: frozenset[str]
) -> tuple[dict[str, Style], list[frozenset[str]]]:
    while True:
        try:
            return _walk(model, graph, values, size, refused)
        except _Conflict as conflict:
            refused |= conflict.names


def _walk(
    model: nn.Module, graph: fx.Graph, values: Mapping[fx.Node, Any], size: int, refused: frozenset[str]
) -> tuple[dict[str, Style], list[frozenset[str]]]:
    """One pass over the graph. A value is described by the column-divided layers whose parts it holds: none, if whole.

    Whole tensors that no layer had a part in (masks, scales) may meet parts; whole activations may not, nor may
    trained parameters, whose gradient would be a rank's part of it. A layer whose weights another one has, too, stays
    whole: divided, each would train its own.

    Raises:
        _Conflict: Some candidate has to stay whole.
    """
    used_directly = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    called = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    refused |= _tied(model)
    whole: frozenset[str] = frozenset()
    parts: dict[fx.Node, frozenset[str]] = {}
    activations: set[fx.Node] = set()
    learned: set[fx.Node] = set()
    styles: dict[str, Style] = {}
    candidates: set[str] = set()
    together: list[frozenset[str]] = []
    for node in graph.nodes:
        given = reduce(operator.or_, (parts[n] for n in node.all_input_nodes), whole)
        name = str(node.target)
        module = model.get_submodule(name) if node.op == "call_module" else None
        free = name not in used_directly and name not in refused and called.count(name) == 1
        free = free and not (module is not None and is_parametrized(module))
        if module is not None or node.op == "placeholder" or not activations.isdisjoint(node.all_input_nodes):
            activations.add(node)
        elif _is_trained(model, node) or not learned.isdisjoint(node.all_input_nodes):
            learned.add(node)
        if node.op == "output":
            _finish(node, given, styles)
        elif not isinstance(values[node], Tensor):
            parts[node] = whole  # a size, a device
        elif isinstance(module, nn.Linear):
            if given:
                if module.in_features % size or not free:
                    raise _Conflict(given)
                styles[name] = "rows"
                together.append(given | {name})
                styles.update(dict.fromkeys(given, "columns"))
                parts[node] = whole
            elif free and module.out_features % size == 0:
                candidates.add(name)
                parts[node] = frozenset({name})
            else:
                parts[node] = whole
        elif isinstance(module, nn.Embedding):
            plain = module.max_norm is None and module.padding_idx is None and not module.scale_grad_by_freq
            if free and plain and module.num_embeddings % size == 0:
                styles[name] = "entries"
            parts[node] = whole
        elif given:
            mixed = any(
                not parts[n] and (n in activations or n in learned) and isinstance(values[n], Tensor)
                for n in node.all_input_nodes
            )
            if mixed or not _keeps_parts(node, module):
                raise _Conflict(given)
            parts[node] = given
        else:
            parts[node] = whole
    unfinished = candidates - styles.keys()
    if unfinished:
        raise _Conflict(frozenset(unfinished))
    return styles, together


def _finish(node: fx.Node, given: frozenset[str], styles: dict[str, Style]) -> None:
    """What reaches the output in parts may only come from the last layer itself: the loss knows how to take it."""
    last = node.args[0]
    if not given:
        return
    if isinstance(last, fx.Node) and last.op == "call_module" and given == {str(last.target)}:
        styles[str(last.target)] = "classes"
        return
    raise _Conflict(given)


def _keeps_parts(node: fx.Node, module: nn.Module | None) -> bool:
    if node.op == "call_module":
        return isinstance(module, _ELEMENTWISE)
    if node.op == "call_function":
        return node.target in _ELEMENTWISE_CALLS or node.target in _BY_HEADS
    return node.op == "call_method" and node.target in _METHODS


def _tied(model: nn.Module) -> frozenset[str]:
    """Names of modules that hold a parameter that another module holds, too."""
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), []).append(name)
    return frozenset(name for names in holders.values() if len(names) > 1 for name in names)


def _is_trained(model: nn.Module, node: fx.Node) -> bool:
    if node.op != "get_attr":
        return False
    path, _, name = str(node.target).rpartition(".")
    value = getattr(model.get_submodule(path), name)
    return isinstance(value, nn.Parameter) and value.requires_grad


def _checked_override(model: nn.Module, name: str, style: str) -> Style:
    modules = dict(model.named_modules())
    if name not in modules:
        raise ConfigError(f"parallel.tensor_styles names {name!r}, which is no module of {type(model).__name__}")
    if style != "whole" and name in _tied(model):
        raise ConfigError(
            f"parallel.tensor_styles divides {name!r}, whose weights another module has, too: each would train its "
            "own. Leave it 'whole'"
        )
    for known in STYLES:
        if style == known:
            return known
    raise ConfigError(f"parallel.tensor_styles.{name} is {style!r}, expected one of {', '.join(STYLES)}")


def _check_sizes(model: nn.Module, styles: Mapping[str, Style], size: int) -> None:
    for name, style in styles.items():
        module = model.get_submodule(name)
        sizes = {
            "columns": getattr(module, "out_features", None),
            "classes": getattr(module, "out_features", None),
            "gathered": getattr(module, "out_features", None),
            "rows": getattr(module, "in_features", None),
            "entries": getattr(module, "num_embeddings", None),
            "sequence": 0,
        }
        divided = sizes[style]
        if divided is None:
            raise ConfigError(f"{name!r} is a {type(module).__name__}, it cannot be divided by {style!r}")
        if divided % size:
            raise ConfigError(
                f"{name!r} has {divided} {'inputs' if style == 'rows' else 'outputs'}, which parallel.tensor={size} "
                "does not divide; choose a divisor"
            )


def _sequence(
    model: nn.Module, graph: fx.Graph, styles: Mapping[str, Style], example: Tensor, size: int
) -> dict[str, Style]:
    """Norms join; everything else that sees a part of the positions must work on each position alone."""
    if example.ndim < 2 or example.shape[1] % size:
        raise ConfigError(
            f"parallel.sequence=true divides positions: expected inputs (B, T, ...) with T a multiple of {size}, found "
            f"{tuple(example.shape)}"
        )
    if not any(style == "entries" for style in styles.values()):
        raise ConfigError("parallel.sequence=true starts at a divided embedding, and this model has none; leave it out")
    found: dict[str, Style] = {}
    values = facts(model, graph, example)
    for node in graph.nodes:
        if node.op != "call_module" or str(node.target) in styles:
            continue
        module, value = model.get_submodule(str(node.target)), values[node].value
        if isinstance(module, _NORMS):
            found[str(node.target)] = "sequence"
        elif any(True for _ in module.parameters()) or not isinstance(module, _ELEMENTWISE):
            raise ConfigError(
                f"parallel.sequence=true: {str(node.target)!r} ({type(module).__name__}, output "
                f"{tuple(value.shape)}) would see a part of the positions only; leave parallel.sequence out"
            )
    return found


# The divided model in one process ---------------------------------------------------------------------------------


def _try_out(model: nn.Module, graph: fx.Graph, plan: TensorPlan, example: Tensor, size: int) -> None:
    """Compute with the parts of all ranks and compare.

    Raises:
        ConfigError: It fails or gives something else.
    """
    with torch.no_grad(), evaluating(model):
        expected = fx.Interpreter(model, graph=graph).run(example[:1])
        try:
            parts = _AllRanks(model, graph, plan, size).run([example[:1]] * size)
        except Exception as error:  # a shape that is written as a constant somewhere in the user's code
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ConfigError(
                f"divided over {size} ranks the model fails: {reason}. Sizes of features and the number of heads must "
                "be read off the tensors (-1 in view and unflatten) and parallel.tensor must divide the heads"
            ) from error
    found = torch.cat(parts, -1) if plan.divides_classes else parts[0]
    scale = float(expected.abs().max()) + 1e-30
    difference = float((found.float() - expected.float()).abs().max()) / scale if found.shape == expected.shape else 1.0
    if not difference < 1e-3:
        raise ConfigError(
            f"divided over {size} ranks the model computes something else (relative difference {difference:.1e}): some "
            "part of it mixes features across heads. Mark those layers 'whole' in parallel.tensor_styles, or set "
            "parallel.tensor=1"
        )


class _AllRanks(fx.Interpreter):
    """Runs every node once a rank, on lists of ``T`` values; layers divided by rows or entries add up over them."""

    def __init__(self, model: nn.Module, graph: fx.Graph, plan: TensorPlan, size: int) -> None:
        super().__init__(model, graph=graph)
        self._styles, self._size = plan.styles, size

    def run(self, values: list[Tensor]) -> list[Tensor]:  # type: ignore[override]
        result: list[Tensor] = super().run(values)
        return result

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return [super().get_attr(target, args, kwargs)] * self._size

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return [target(*self._of(args, r), **self._of(kwargs, r)) for r in range(self._size)]

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.call_function(lambda value, *rest, **named: getattr(value, target)(*rest, **named), args, kwargs)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module: Any = self.fetch_attr(target)
        style, (values, *_) = self._styles.get(target, "whole"), args
        if style in ("columns", "classes"):
            weights = module.weight.chunk(self._size)
            biases = [None] * self._size if module.bias is None else module.bias.chunk(self._size)
            return [F.linear(x, w, b) for x, w, b in zip(values, weights, biases, strict=True)]
        if style == "rows":
            weights = module.weight.chunk(self._size, 1)
            total: Any = sum(F.linear(x, w) for x, w in zip(values, weights, strict=True))
            return [total if module.bias is None else total + module.bias] * self._size
        return [module(*self._of(args, r), **self._of(kwargs, r)) for r in range(self._size)]

    def output(self, target: Any, args: Any, kwargs: Any) -> Any:
        return args[0]

    def _of(self, values: Any, rank: int) -> Any:
        """Of every list of ``T`` values the one of a rank."""
        if isinstance(values, dict):
            return {key: self._of(value, rank) for key, value in values.items()}
        if isinstance(values, tuple):
            return tuple(self._of(value, rank) for value in values)
        return values[rank] if isinstance(values, list) else values


# torch's styles ---------------------------------------------------------------------------------------------------


def _torch_style(style: Style, position_dim: int | None) -> ParallelStyle:
    between = Replicate() if position_dim is None else Shard(position_dim)
    if style in ("columns", "classes"):
        return ColwiseParallel(input_layouts=between)
    if style == "gathered":
        return ColwiseParallel(input_layouts=between, output_layouts=Replicate())
    if style == "rows":
        return RowwiseParallel(output_layouts=between)
    if style == "entries":
        return RowwiseParallel(input_layouts=Replicate(), output_layouts=between)
    return SequenceParallel(sequence_dim=1 if position_dim is None else position_dim)

"""Cutting a model into pipeline stages: consecutive parts of its graph with one tensor between them, of equal cost.

A stage is a graph of its own over the model's modules, which it shares and which keep their names: gradients,
optimizer state, codec feedback and checkpoints of a pipeline are those of the whole model, spread over its ranks.
"""

# S stages, U units: the parts between two places where a model can be cut

import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from efftrain.errors import ConfigError
from efftrain.parallel.graph import NodeFacts, evaluating, facts, part_of, tensors, trace, uses


@dataclass(frozen=True, eq=False)
class StageCut:
    """One stage of a model, without its weights."""

    graph: fx.Graph
    """Takes one tensor and gives one."""
    names: tuple[str, ...]
    """Modules and single parameters that it uses; the last stage has those that none uses, too."""
    cost: float
    """Estimated FLOPs of a forward pass."""
    input_shape: tuple[int, ...]
    input_dtype: torch.dtype
    output_shape: tuple[int, ...]
    output_dtype: torch.dtype

    @property
    def input_bytes(self) -> int:
        """Of a micro-batch."""
        return math.prod(self.input_shape) * self.input_dtype.itemsize

    @property
    def output_bytes(self) -> int:
        """Of a micro-batch."""
        return math.prod(self.output_shape) * self.output_dtype.itemsize

    def build(self, model: nn.Module) -> fx.GraphModule:
        """The stage, made of the model's own parts: of the model that was cut, or one that has the same."""
        return fx.GraphModule(model, self.graph)


def cut_model(
    model: nn.Module,
    example: Tensor,
    num_stages: int,
    *,
    together: Sequence[Collection[str]] = (),
    closed: Collection[str] = (),
    bf16: bool = False,
) -> list[StageCut]:
    """Cut a model into stages such that the most expensive one is as cheap as can be.

    Modules are opened only as far as it takes to find enough places to cut.

    Args:
        model: On the CPU or its device; not changed.
        example: A micro-batch of inputs, any values. Costs and shapes are found without computing.
        num_stages: ``S``, at least 1.
        together: Names of modules that belong into one stage, with all between them.
        closed: Names of modules that are not cut.
        bf16: It runs under autocast; what travels between stages has another dtype then.

    Raises:
        ConfigError: The model cannot be traced, asks for ``self.training`` where it is cut, has fewer than ``S`` parts
            that train something, with one tensor between them, or uses a buffer in two stages.
    """
    opened: set[str] = set()
    while True:
        graph = trace(model, opened, closed)
        found = facts(model, graph, example, bf16=bf16)
        ends = _places(model, graph, found, together)
        if len(ends) >= num_stages:
            break
        units = [
            node
            for node in graph.nodes
            if node.op == "call_module" and _can_open(model, node) and node.target not in closed
        ]
        if not units:
            kept = " and blocks that parallel.checkpointing and parallel.compile keep whole" if closed else ""
            raise ConfigError(
                f"model {type(model).__name__} can be cut into {len(ends)} stages at most, the plan wants {num_stages} "
                f"(parallel.pipeline x stages a rank), each with parameters that are trained{kept}. Lower "
                "parallel.pipeline, take a schedule with one stage a rank, or give the model more layers with one "
                "tensor between them"
            )
        dearest = model.get_submodule(str(max(units, key=lambda node: found[node].cost).target))
        opened |= {str(n.target) for n in units if type(model.get_submodule(str(n.target))) is type(dearest)}
    _refuse_modes(model, opened, closed)
    nodes = list(graph.nodes)
    costs = [sum(found[node].cost for node in nodes[a:b]) for a, b in itertools.pairwise([0, *ends])]
    chosen = [ends[i - 1] for i in balance(costs, num_stages)]
    cuts = []
    start, given = 0, None
    for number, end in enumerate(chosen):
        last = number == num_stages - 1
        cuts.append(_stage(nodes[start:end], given, None if last else nodes[end - 1], found))
        start, given = end, nodes[end - 1]
    cuts[-1] = replace(cuts[-1], names=(*cuts[-1].names, *_unused(model, cuts)))
    _refuse_shared(
        model, graph, {node: i for i, (a, b) in enumerate(itertools.pairwise([0, *chosen])) for node in nodes[a:b]}
    )
    return cuts


def _refuse_modes(model: nn.Module, opened: Collection[str], closed: Collection[str]) -> None:
    """A graph has only one of the ways that a forward takes."""
    graphs = []
    for training in (True, False):
        with evaluating(model, training):
            graphs.append(str(trace(model, opened, closed)))
    if graphs[0] != graphs[1]:
        raise ConfigError(
            f"model {type(model).__name__} does something else in training than in evaluation where it is cut into "
            "stages (self.training in its forward), and a stage would do one of them always; use nn.Dropout or another "
            "module for it, put that part into a module of its own, or set parallel.pipeline=1"
        )


def _unused(model: nn.Module, cuts: Sequence[StageCut]) -> list[str]:
    """Parameters and buffers that no stage uses: a checkpoint is of the whole model, and so is what is exported."""
    names = [name for cut in cuts for name in cut.names]
    used = {id(tensor) for name, tensor in tensors(part_of(model, names))}
    return [name for name, tensor in tensors(model) if id(tensor) not in used]


def shared_parameters(model: nn.Module, cuts: Sequence[StageCut]) -> dict[str, tuple[int, ...]]:
    """The stages of each parameter that more than one of them uses, by its first name."""
    used = [{id(parameter) for parameter in part_of(model, cut.names).parameters()} for cut in cuts]
    found = {
        name: tuple(number for number, ids in enumerate(used) if id(parameter) in ids)
        for name, parameter in model.named_parameters()
    }
    return {name: stages for name, stages in found.items() if len(stages) > 1}


def balance(costs: Sequence[float], num_parts: int) -> list[int]:
    """Where to cut a row so that its most expensive part is as cheap as can be.

    Args:
        costs: Of ``U`` units in their order, 0 or more each.
        num_parts: At most ``U``.

    Returns:
        The ends of the parts, counted in units: ``num_parts`` of them, rising, the last is ``U``. No part is empty.
    """
    assert 1 <= num_parts <= len(costs), "fewer units than parts"
    total = [0.0, *itertools.accumulate(costs)]
    # best[n][u]: the smallest maximum over n parts of the first u units, and where the last part begins.
    best = [{u: (total[u], 0) for u in range(1, len(costs) + 1)}]
    for n in range(2, num_parts + 1):
        before = best[-1]
        best.append(
            {
                u: min((max(before[v][0], total[u] - total[v]), v) for v in range(n - 1, u))
                for u in range(n, len(costs) + 1)
            }
        )
    ends = [len(costs)]
    for n in range(num_parts, 1, -1):
        ends.append(best[n - 1][ends[-1]][1])
    return ends[::-1]


def _places(
    model: nn.Module, graph: fx.Graph, found: dict[fx.Node, NodeFacts], together: Sequence[Collection[str]]
) -> list[int]:
    """After which nodes exactly one floating-point tensor is still needed; the end of the graph is the last of them.

    Every part between two of them trains something.
    """
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    trained = {node for node, name in uses(graph, model) if name in trainable}
    nodes = list(graph.nodes)
    number = {node: i for i, node in enumerate(nodes)}
    last_use = {node: max((number[user] for user in node.users), default=-1) for node in nodes}
    inside = [_extent(nodes, group) for group in together]
    ends, start = [], 0
    for i, node in enumerate(nodes[:-1]):
        live = [n for n in nodes[: i + 1] if n.op != "get_attr" and last_use[n] > i]
        value = found[node].value
        alone = live == [node] and isinstance(value, Tensor) and value.is_floating_point() and node.op != "placeholder"
        alone = alone and not any(first <= i < last for first, last in inside)
        if alone and not trained.isdisjoint(nodes[start : i + 1]):
            ends.append(i + 1)
            start = i + 1
    if ends and trained.isdisjoint(nodes[ends[-1] :]):
        ends.pop()  # what is left after it is part of the last
    return [*ends, len(nodes)]


def _extent(nodes: Sequence[fx.Node], group: Collection[str]) -> tuple[int, int]:
    """The first and the last node that call a module of the group, or one that it is inside of."""
    called = [
        i
        for i, node in enumerate(nodes)
        if node.op == "call_module" and any(f"{name}.".startswith(f"{node.target}.") for name in group)
    ]
    return (min(called), max(called)) if called else (0, 0)


def _can_open(model: nn.Module, node: fx.Node) -> bool:
    module = model.get_submodule(str(node.target))
    return not type(module).__module__.startswith("torch.nn") and any(True for _ in module.children())


def _stage(
    nodes: Sequence[fx.Node],
    given: fx.Node | None,
    result: fx.Node | None,
    found: dict[fx.Node, NodeFacts],
) -> StageCut:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    if given is not None:
        copies[given] = graph.placeholder(given.name)
    wanted = {attribute for node in nodes for attribute in node.all_input_nodes if attribute.op == "get_attr"}
    for attribute in sorted(wanted - set(nodes), key=lambda node: node.name):
        copies[attribute] = graph.node_copy(attribute)
    for node in nodes:
        copies[node] = graph.node_copy(node, lambda n: copies[n])
    if result is not None:
        graph.output(copies[result])
    graph.lint()
    names = {str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")}
    first = nodes[0] if given is None else given
    last = result if result is not None else nodes[-1]
    before, after = found[first].value, found[last].value
    return StageCut(
        graph,
        tuple(sorted(names)),
        sum(found[node].cost for node in nodes),
        tuple(before.shape),
        before.dtype,
        tuple(after.shape),
        after.dtype,
    )


def _refuse_shared(model: nn.Module, graph: fx.Graph, stage_of: dict[fx.Node, int]) -> None:
    """One buffer in two stages would be two, each with a history of its own."""
    first: dict[str, int] = {}
    buffers = {name for name, _ in model.named_buffers()}
    for node, name in uses(graph, model):
        if name not in buffers:
            continue
        places = {stage_of[user] for user in node.users} if node.op == "get_attr" else {stage_of[node]}
        for stage in sorted(places):
            if first.setdefault(name, stage) != stage:
                raise ConfigError(
                    f"buffer {name!r} is used in pipeline stages {first[name]} and {stage}, each would keep a copy of "
                    "its own. Give each stage a module of its own, or set parallel.pipeline=1"
                )

"""The fp32 host profile, first half: a float graph -> the steps and buffers of batched training on this machine.

The profile trains every parameter in floating point, many samples a step, to simulate many clients fast; it runs on no
board. It takes chains: one layer after the other, without branches. Everything else is refused by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from efftrain.errors import CompileError
from efftrain.ondevice.ir import Apply, Conv, FloatGraph, FloatOp, GlobalAverage, Pool

LANES = 8
MAX_FLOATS = 1 << 28
"""Of an arena: places are counted in int32."""
_SUPPORTED = "convolutions (groups=1), linear layers, ReLU, ReLU6, max and average pools, flatten"
_INFINITY = float("inf")


def up_to(number: int, multiple: int) -> int:
    """The next multiple that is not below ``number``."""
    return -(-number // multiple) * multiple


@dataclass(frozen=True, slots=True)
class Map:
    """One activation: ``copies`` samples of it, and its gradient."""

    height: int
    width: int
    channels: int
    column: int
    """Floats from one position to the next: the channels, filled up to whole vectors except in the input."""
    pad: tuple[int, int]
    """Zeros above and below, left and right, as many as the layer that reads it wants."""
    offset: int
    gradient: int
    """Offset of the gradient; 0 where nothing asks for it."""
    gradient_next: int
    """Floats from one sample's gradient to the next; 0 if all take turns in one place."""

    @property
    def row(self) -> int:
        """Floats from one row to the next."""
        return (self.width + 2 * self.pad[1]) * self.column

    @property
    def first(self) -> int:
        """Place of the first element inside the border."""
        return self.pad[0] * self.row + self.pad[1] * self.column

    @property
    def next(self) -> int:
        """Floats from one sample to the next."""
        return up_to((self.height + 2 * self.pad[0]) * self.row, 16)


@dataclass(frozen=True, slots=True)
class Parameter:
    """A tensor of the model's state, and where it lies while it is trained."""

    name: str
    shape: tuple[int, int, int, int]
    """Outputs, channels, height, width; a bias is (1, channels, 1, 1)."""
    steps: tuple[int, int, int]
    """Floats from one output, row and column to the next; channels are side by side."""
    offset: int
    """From the start of the weights; those of their velocities and gradients are the same."""
    num_floats: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvStep:
    """A convolution, with the clamp and the pool of windows that do not overlap that follow it."""

    name: str
    x: Map
    y: Map
    weight: Parameter
    bias: Parameter | None
    taps: int
    """Offset of the weights with the output channel last."""
    kernel: tuple[int, int]
    stride: tuple[int, int]
    out: tuple[int, int]
    """Height and width before the pool."""
    clamp: float | None
    pool: tuple[int, int] | None
    which: int
    """Offset of the places of the largest; see ``eft_max_pool_row_f32``."""
    entries: int
    """Offset of the lists that its backward pass reads; ``room`` of them a channel."""
    room: int
    rows: int
    """Offset of the rows that wait for their pool."""

    @property
    def row(self) -> int:
        """Floats that a row of the kernel covers."""
        return self.kernel[1] * self.x.column

    @property
    def padded(self) -> int:
        """The same in whole vectors."""
        return up_to(self.row, LANES)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearStep:
    """A layer whose every output sees the whole input."""

    name: str
    x: Map
    y: Map
    weight: Parameter
    bias: Parameter | None
    clamp: float | None

    @property
    def inputs(self) -> int:
        """Floats of a row of the weights."""
        return self.weight.steps[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolStep:
    """Any other pool."""

    name: str
    x: Map
    y: Map
    kind: str
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    which: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ClampStep:
    """A ReLU or ReLU6 that no layer could take up."""

    name: str
    x: Map
    y: Map
    clamp: float


Step: TypeAlias = ConvStep | LinearStep | PoolStep | ClampStep


@dataclass(frozen=True, slots=True)
class HostPlan:
    """One training step of a batch.

    Offsets count floats from the start of the arena.
    """

    batch_size: int
    together: int
    """Samples that a linear layer takes at a time."""
    steps: tuple[Step, ...]
    parameters: tuple[Parameter, ...]
    weights: int
    velocities: int
    gradients: int
    num_weights: int
    """Floats of each of these three."""
    zeros: int
    """The bias of layers that have none."""
    targets: int
    arena_floats: int

    @property
    def input(self) -> Map:
        """What the network reads."""
        return self.steps[0].x

    @property
    def num_classes(self) -> int:
        """Outputs of the last layer."""
        return self.steps[-1].y.channels


def plan_host(graph: FloatGraph, batch_size: int) -> HostPlan:
    """Lay out the training of a canonical graph.

    Args:
        graph: From ``read_module``.
        batch_size: Samples of a step, at least 1.

    Raises:
        CompileError: An operator is not supported, or the graph branches.
    """
    return _Planner(graph, batch_size).run()


class _Planner:
    def __init__(self, graph: FloatGraph, batch_size: int) -> None:
        self._graph = graph
        self._batch = batch_size
        # Each block of samples costs its products and about one more round for what it reads.
        self._together = min(range(1, 6), key=lambda t: (-(-batch_size // t) * (t + 1), t))
        self._copies = up_to(batch_size, self._together)
        self._used = 0
        self._parameters: list[Parameter] = []
        self._num_weights = 0

    def run(self) -> HostPlan:
        groups = _chain(self._graph)
        first_layer = next(i for i, group in enumerate(groups) if isinstance(group[0], Conv))
        maps = [self._map(groups, i, i > first_layer) for i in range(len(groups) + 1)]
        steps = tuple(self._step(group, maps[i], maps[i + 1]) for i, group in enumerate(groups))
        regions = [self._take(self._num_weights) for _ in range(3)]
        zeros = self._take(max(m.column for m in maps))
        targets = self._take(self._copies)
        if self._used > MAX_FLOATS:
            raise CompileError(
                f"training in batches of {self._batch} needs {4 * self._used} bytes; at most {4 * MAX_FLOATS} are "
                "supported. Use a smaller model or batch."
            )
        return HostPlan(
            batch_size=self._batch,
            together=self._together,
            steps=steps,
            parameters=tuple(self._parameters),
            weights=regions[0],
            velocities=regions[1],
            gradients=regions[2],
            num_weights=self._num_weights,
            zeros=zeros,
            targets=targets,
            arena_floats=self._used,
        )

    def _take(self, num_floats: int) -> int:
        """Room in the arena, with one vector more that a kernel may read past its end."""
        offset, self._used = self._used, self._used + up_to(num_floats + LANES, 16)
        return offset

    def _map(self, groups: list[list[FloatOp]], i: int, has_gradient: bool) -> Map:
        """What group ``i - 1`` writes and group ``i`` reads."""
        name = groups[i][0].x if i < len(groups) else groups[-1][-1].y
        height, width, channels = self._graph.tensors[name].shape
        reader = groups[i][0] if i < len(groups) else None
        compact = i == 0 and isinstance(reader, Conv)
        pad = reader.padding[:2] if isinstance(reader, Conv) and not self._is_linear(reader) else (0, 0)
        found = Map(height, width, channels, channels if compact else up_to(channels, LANES), pad, 0, 0, 0)
        neighbors = [groups[j][0] for j in (i - 1, i) if 0 <= j < len(groups)]
        batched = reader is None or any(isinstance(op, Conv) and self._is_linear(op) for op in neighbors)
        gradient_next = found.next if batched else 0
        offset = self._take(self._copies * found.next)
        gradient = self._take(self._copies * gradient_next or found.next) if has_gradient else 0
        return Map(height, width, channels, found.column, pad, offset, gradient, gradient_next)

    def _is_linear(self, op: Conv) -> bool:
        """Whether the kernel covers the whole map."""
        kernel = self._graph.constants[op.weight].shape[1:3]
        return not any(op.padding) and kernel == self._graph.tensors[op.x].shape[:2]

    def _step(self, group: list[FloatOp], x: Map, y: Map) -> Step:
        op = group[0]
        if isinstance(op, Conv):
            return self._linear(op, x, y) if self._is_linear(op) else self._conv(op, group, x, y)
        if isinstance(op, Apply):
            return ClampStep(name=op.name, x=x, y=y, clamp=6.0 if op.function == "relu6" else _INFINITY)
        if isinstance(op, Pool):
            which = self._take(self._batch * y.height * y.width * y.column) if op.kind == "max" else 0
            settings = (op.kernel, op.stride, op.padding[:2])
        else:
            which, settings = 0, ((x.height, x.width), (1, 1), (0, 0))
        kind = "max" if isinstance(op, Pool) and op.kind == "max" else "average"
        kernel, stride, padding = settings
        return PoolStep(name=op.name, x=x, y=y, kind=kind, kernel=kernel, stride=stride, padding=padding, which=which)

    def _linear(self, op: Conv, x: Map, y: Map) -> LinearStep:
        shape = (y.channels, x.channels, x.height, x.width)
        inputs = up_to(x.height * x.row, LANES)
        weight = self._parameter(op.weight, shape, (inputs, x.row, x.column), y.channels * inputs)
        bias = self._bias(op, y)
        return LinearStep(name=op.name, x=x, y=y, weight=weight, bias=bias, clamp=_clamp(op))

    def _conv(self, op: Conv, group: list[FloatOp], x: Map, y: Map) -> ConvStep:
        _, kernel_h, kernel_w, _ = self._graph.constants[op.weight].shape
        out_h, out_w, _ = self._graph.tensors[op.y].shape
        pool = group[1].kernel if len(group) > 1 and isinstance(group[1], Pool) else None
        padded = up_to(kernel_w * x.column, LANES)
        shape = (y.channels, x.channels, kernel_h, kernel_w)
        steps = (kernel_h * padded, padded, x.column)
        weight = self._parameter(op.weight, shape, steps, y.channels * kernel_h * padded)
        room = y.height * y.width + 1
        return ConvStep(
            name=op.name,
            x=x,
            y=y,
            weight=weight,
            bias=self._bias(op, y),
            taps=self._take(kernel_h * kernel_w * x.column * y.column),
            kernel=(kernel_h, kernel_w),
            stride=op.stride,
            out=(out_h, out_w),
            clamp=_clamp(op),
            pool=pool,
            which=self._take(self._batch * y.height * y.width * y.column) if pool else 0,
            entries=self._take(y.channels * (2 * room + 1)),
            room=room,
            rows=self._take(pool[0] * out_w * y.column) if pool else 0,
        )

    def _bias(self, op: Conv, y: Map) -> Parameter | None:
        if op.bias is None:
            return None
        return self._parameter(op.bias, (1, y.channels, 1, 1), (y.column, y.column, y.column), y.column)

    def _parameter(
        self, name: str, shape: tuple[int, int, int, int], steps: tuple[int, int, int], num_floats: int
    ) -> Parameter:
        num_floats = up_to(num_floats, LANES)
        self._parameters.append(Parameter(name, shape, steps, self._num_weights, num_floats))
        self._num_weights += num_floats
        return self._parameters[-1]


def _clamp(op: Conv) -> float | None:
    return {"none": None, "relu": _INFINITY, "relu6": 6.0}[op.activation]


def _chain(graph: FloatGraph) -> list[list[FloatOp]]:
    """The ops in order; a pool that a convolution can take up is put into its group."""
    groups: list[list[FloatOp]] = []
    previous = graph.input
    for op in graph.ops:
        _check(op, graph)
        if op.x != previous:
            raise CompileError(f"{op.name} at {op.source} does not read what the layer before it wrote: {_remedy()}")
        last = groups[-1] if groups else []
        if len(last) == 1 and isinstance(last[0], Conv) and _fits(op, last[0], graph):
            last.append(op)
        else:
            groups.append([op])
        previous = op.y
    return groups


def _fits(op: FloatOp, conv: Conv, graph: FloatGraph) -> bool:
    """Whether a pool's windows touch but do not overlap, and more than one position goes in."""
    return (
        isinstance(op, Pool)
        and op.kind == "max"
        and op.kernel == op.stride
        and not any(op.padding)
        and graph.tensors[conv.y].shape[:2] != (1, 1)
    )


def _check(op: FloatOp, graph: FloatGraph) -> None:
    known = isinstance(op, Conv | Pool | GlobalAverage) or (isinstance(op, Apply) and op.function in ("relu", "relu6"))
    if not known:
        what = op.function if isinstance(op, Apply) else type(op).__name__.lower()
        raise CompileError(f"operator {what} ({op.name} at {op.source}) is not supported: {_remedy()}")
    if isinstance(op, Conv | Pool) and op.padding[:2] != op.padding[2:]:
        what = f"{type(op).__name__.lower()} with padding {op.padding}"
        raise CompileError(f"operator {what} ({op.name} at {op.source}) is not supported: {_remedy()}")
    if isinstance(op, Conv) and op.groups != 1:
        depthwise = op.groups == graph.tensors[op.y].shape[2]
        what = "depthwise convolution" if depthwise else f"convolution with groups={op.groups}"
        raise CompileError(f"operator {what} ({op.name} at {op.source}) is not supported: {_remedy()}")


def _remedy() -> str:
    return f"the fp32 host profile trains chains of {_SUPPORTED}"


def check_parameters(plan: HostPlan, state: Mapping[str, object]) -> None:
    """Refuse a model whose state holds more than weights and biases of the plan's layers.

    The front end folds batch norms into the layer before them, as a device that never changes them may; a training
    that must change them would silently be another one.

    Raises:
        CompileError: Names the module that the first tensor too many belongs to.
    """
    known = {parameter.name for parameter in plan.parameters}
    for name in sorted(set(state) - known):
        owner = name.rpartition(".")[0]
        what = "batch norm" if f"{owner}.running_mean" in state else "layer"
        raise CompileError(f"operator {what} ({owner or name}) with the tensor {name!r} is not supported: {_remedy()}")
    for name in sorted(known - set(state)):
        raise CompileError(f"the parameters {name!r} are no tensor of the model's state: {_remedy()}")

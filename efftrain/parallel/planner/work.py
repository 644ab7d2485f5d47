"""What one rank computes, keeps and sends in its tensor axis for one micro-batch, found by running its part of a model.

The part runs on tensors without memory: forward, loss and backward, operator by operator, with the layers that a tensor
axis divides as small as one rank has them. So any model that runs can be planned, of any size.
"""

import copy
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from efftrain.parallel.planner.hardware import Hardware
from efftrain.parallel.recompute import Checkpointing, recompute
from efftrain.profile.trace import Block, Operation, Trace, trace_training


@dataclass(frozen=True)
class Parameter:
    """One trained parameter as a rank holds it."""

    name: str
    shape: tuple[int, ...]
    layer: str

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Work:
    """One part of a model on one rank, for one micro-batch.

    Attributes:
        forward, backward: Operators that move or compute something, in their order.
        parameters: That the rank trains, in the model's order.
        weight_bytes: Of all parameters and buffers.
        saved_bytes: Kept from the forward for the backward pass.
        first_peak_bytes: Largest sum of activations and gradients at once, weights apart, if no gradient is there yet.
        later_peak_bytes: The same without the gradients, which earlier micro-batches have made.
        reduced_bytes: Of activations that the tensor axis adds up, forward and backward together; one entry each.
        divided_operators: Operators that run on divided tensors.
        output_bytes: What goes on to the next stage.
        handed_bytes: Of what stages get from their neighbors, both ways, and of logits: kept of every micro-batch until
            a step ends.
    """

    forward: tuple[Operation, ...]
    backward: tuple[Operation, ...]
    parameters: tuple[Parameter, ...]
    weight_bytes: int
    saved_bytes: int
    first_peak_bytes: int
    later_peak_bytes: int
    reduced_bytes: tuple[int, ...]
    divided_operators: int
    output_bytes: int
    handed_bytes: int = 0

    @property
    def num_parameters(self) -> int:
        """Elements that the rank trains."""
        return sum(parameter.size for parameter in self.parameters)


def seconds(operations: Sequence[Operation], hardware: Hardware, *, bf16: bool) -> float:
    """Time of operators one after the other: each as long as its arithmetic or its memory takes, and its start."""
    start = (hardware.operator_us + hardware.autograd_us) / 1e6
    rate = (hardware.gflops_bf16 if bf16 else hardware.gflops) * 1e9
    total = 0.0
    for operation in operations:
        moved = sum(block.elements * block.itemsize for block in (*operation.reads, *operation.writes))
        total += hardware.efficiency * max(2 * operation.macs / rate, moved / (hardware.memory_gb_s * 1e9)) + start
    return total


def ready_times(work: Work, hardware: Hardware, *, bf16: bool) -> tuple[dict[str, float], float]:
    """When each parameter's gradient is there, in seconds from the start of the backward pass, and when that ends."""
    now, last = 0.0, {}
    for operation in work.backward:
        now += seconds([operation], hardware, bf16=bf16)
        last[operation.layer] = now
    return {parameter.name: last.get(parameter.layer, now) for parameter in work.parameters}, now


def measure_work(
    part: nn.Module,
    inputs: Tensor,
    *,
    styles: Mapping[str, str] | None = None,
    size: int = 1,
    with_loss: bool = True,
    bf16: bool = False,
    checkpointing: Checkpointing = "none",
    blocks: Sequence[str] | None = None,
) -> Work:
    """Run a part of a model on tensors without memory.

    Args:
        part: The model, or a stage of it whose modules keep their names. Not changed.
        inputs: Of one micro-batch; their values do not matter.
        styles: Module name -> style of the tensor axis (``TensorPlan.styles``).
        size: Ranks of the tensor axis.
        with_loss: The part ends in a mean cross-entropy; else in a tensor for the next stage.
        bf16: It runs under autocast.
        checkpointing: What is computed again in the backward pass.
        blocks: Names of the part's blocks, if it is a stage of a model.
    """
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        # A tensor without memory for each of its own; whatever else the part holds is copied.
        kept: dict[int, Any] = {
            id(p): nn.Parameter(mode.from_tensor(p.detach()), p.requires_grad) for p in part.parameters()
        }
        kept |= {id(buffer): mode.from_tensor(buffer) for buffer in part.buffers()}
        local = copy.deepcopy(part, kept)
        _divide(local, styles or {}, size)
        recompute(local, checkpointing, blocks)
        whole = _WithLoss(local) if with_loss else local
        example = mode.from_tensor(inputs)
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=bf16):
            forward, backward = trace_training(whole, (example,))
        named = [(name.removeprefix("model."), p) for name, p in whole.named_parameters() if p.requires_grad]
        trained = {name: tuple(p.shape) for name, p in named}
        weights = sum(t.numel() * t.itemsize for t in (*whole.parameters(), *whole.buffers()))
    first_ops, last_ops = _real(forward), _real(backward)
    layers = {f"model.{name}" if with_loss else name: style for name, style in (styles or {}).items()}
    reduced, divided = _over_tensor_axis(forward, layers)
    output = forward.output_shapes.get("", ())
    prefix = "model." if with_loss else ""
    parameters = [Parameter(name, shape, (prefix + name).rpartition(".")[0]) for name, shape in trained.items()]
    return Work(
        forward=tuple(first_ops),
        backward=tuple(last_ops),
        parameters=tuple(parameters),
        weight_bytes=weights,
        saved_bytes=_kept(forward, backward),
        first_peak_bytes=_peak(forward, backward, keeps_gradients=True),
        later_peak_bytes=_peak(forward, backward, keeps_gradients=False),
        reduced_bytes=tuple(reduced),
        divided_operators=divided,
        output_bytes=0 if with_loss else (2 if bf16 else 4) * math.prod(output),
    )


class _WithLoss(nn.Module):
    """Mean cross-entropy over all positions. Targets are zeros."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        logits = self.model(inputs)
        logits = logits.flatten(0, -2).float()
        return nn.functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))


def _divide(part: nn.Module, styles: Mapping[str, str], size: int) -> None:
    """Give the layers the sizes that they have on one rank."""
    modules = dict(part.named_modules())
    for name, style in styles.items():
        module: Any = modules.get(name)
        if module is None or style == "sequence":
            continue
        dim = 1 if style == "rows" else 0
        length = module.weight.shape[dim] // size
        module.weight = nn.Parameter(module.weight.detach().narrow(dim, 0, length).clone())
        if style in ("columns", "classes") and module.bias is not None:
            module.bias = nn.Parameter(module.bias.detach()[:length].clone())


def _real(trace: Trace) -> list[Operation]:
    """What moves or computes something."""
    return [o for o in trace.operations if not o.is_view and not _asks(o)]


def _asks(operation: Operation) -> bool:
    """A question that only tensors without memory are asked."""
    return operation.name.startswith("prim.")


def _over_tensor_axis(forward: Trace, styles: Mapping[str, str]) -> tuple[list[int], int]:
    """Bytes of each all-reduce: outputs of rows and entries, and the gradients of what goes into columns."""
    reduced, operators = [], 0
    for operation in forward.operations:
        style = styles.get(operation.layer)
        if style is None or _asks(operation):
            continue
        operators += 1
        if operation.is_view or not operation.writes:
            continue
        if style in ("rows", "entries"):
            reduced.append(_bytes(operation.writes[0]))
        elif style in ("columns", "classes") and operation.macs:
            given = [block for block in operation.reads if not block.is_state]
            reduced += [_bytes(given[0])] if given else []
    return reduced, operators


def _peak(forward: Trace, backward: Trace, *, keeps_gradients: bool) -> int:
    """Largest sum of what is alive at once: from the operator that makes it to the last one that reads it.

    Gradients of parameters are what the backward pass writes and nobody reads; they stay, or are added to older ones.
    """
    first, last = ([o for o in trace.operations if not _asks(o)] for trace in (forward, backward))
    operations = [*first, *last]
    sizes: dict[int, int] = {}
    born: dict[int, int] = {}
    dies: dict[int, int] = {}
    for block in forward.input_storages.values():
        sizes[block.storage], born[block.storage], dies[block.storage] = _bytes(block), 0, 0
    read_last: dict[int, int] = {}
    for at, operation in enumerate(operations):
        for block in (*operation.reads, *operation.writes):
            if not block.is_state:
                sizes.setdefault(block.storage, _bytes(block))
                born.setdefault(block.storage, at)
                dies[block.storage] = at
        if not operation.is_view:
            for block in operation.reads:
                read_last[block.storage] = at
    start_of_backward = len(first)
    for _, block in forward.saved:
        if block.storage in sizes:
            dies[block.storage] = max(dies[block.storage], start_of_backward)
    if keeps_gradients:
        for storage, at in born.items():
            if at >= start_of_backward and read_last.get(storage, -1) <= at:
                dies[storage] = len(operations) - 1
    change: dict[int, int] = defaultdict(int)
    for storage, size in sizes.items():
        change[born[storage]] += size
        change[dies[storage] + 1] -= size
    peak = alive = 0
    for at in sorted(change):
        alive += change[at]
        peak = max(peak, alive)
    return peak


def _kept(forward: Trace, backward: Trace) -> int:
    """What the forward pass made or was given and the backward pass reads."""
    made = {b.storage: _bytes(b) for o in reversed(forward.operations) for b in reversed(o.writes) if not b.is_state}
    made |= {block.storage: _bytes(block) for block in forward.input_storages.values()}
    read = {block.storage for operation in backward.operations for block in operation.reads}
    return sum(size for storage, size in made.items() if storage in read)


def _bytes(block: Block) -> int:
    return block.elements * block.itemsize

"""A divided model beside the whole one, on the ranks that are going to train it: one gradient, or no run.

What a graph does not show (weights that two layers share, a parameter that is used on parts, a mean over positions of
which a rank has some) shows in the gradients. So before the first step every tensor plan computes the output and all
gradients for a few samples twice: whole in each rank, and divided over the ranks.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from efftrain.errors import ConfigError
from efftrain.parallel.axes import Axes, settle_layout
from efftrain.parallel.graph import evaluating
from efftrain.parallel.replicas import broadcast, sum_numbers
from efftrain.parallel.tensor import TensorPlan, divide

_BOUND = 1e-3
"""Of a tensor's largest entry. What is wrong differs by more."""
_FLOOR = 1e-2
"""Of the largest entry of all gradients: what is smaller counts as if it had that. Sums in another order differ by 1e-6
of the largest of all, also where they cancel to zero."""


def try_divided(model: nn.Module, plan: TensorPlan, axes: Axes) -> None:
    """Compare a divided copy with the model, which stays as it is. Every rank calls it.

    Takes the memory of a second model and its gradients until it returns.

    Args:
        model: Whole, equal on all ranks, on the device of this rank.
        plan: How it is going to be divided.
        axes: The mesh.

    Raises:
        ConfigError: It fails, or some gradient is another; on all ranks, with the parameter's name.
    """
    ranks = axes.transport("tensor")
    example = plan.example.to(axes.device)
    broadcast(ranks, example)
    twin = copy.deepcopy(model)
    with evaluating(twin), _exact_products():
        expected = _output_and_gradients(twin, twin(example))
        twin.zero_grad()
        try:
            divide(twin, plan, axes.mesh["tensor"])
            output = twin(example)
            if plan.divides_classes:
                output = DTensor.from_local(output, axes.mesh["tensor"], [Shard(-1)])
            found = _output_and_gradients(twin, output)
        except RuntimeError as error:
            raise ConfigError(f"{_beginning(axes)} it fails: {str(error).splitlines()[0]}. {_remedy(plan)}") from error
    names = list(expected)
    scales = {name: float(value.abs().max()) if value.numel() else 0.0 for name, value in expected.items()}
    floor = _FLOOR * max((scale for name, scale in scales.items() if name), default=0.0)
    differences = [_difference(found[name], expected[name], max(scales[name], floor)) for name in names]
    # The largest of all ranks would do; their sum is as good and there is one already.
    worst, name = max(zip(sum_numbers(ranks, differences), names, strict=True))
    if worst > _BOUND:
        what = f"another gradient of {name!r}" if name else "another output"
        raise ConfigError(
            f"{_beginning(axes)} it has {what} than in one process (difference {worst:.1e} of its largest entry): some "
            f"part of it uses what a rank has only a part of. {_remedy(plan)}"
        )


def _output_and_gradients(model: nn.Module, output: Tensor) -> dict[str, Tensor]:
    """Of a sum over the output with weights that are the same for all ranks. The output's name is empty."""
    whole = output.full_tensor() if isinstance(output, DTensor) else output
    weights = torch.randn(whole.shape, generator=torch.Generator().manual_seed(0)).to(whole.device)
    if isinstance(output, DTensor):
        rank, size = output.device_mesh.get_local_rank(), output.device_mesh.size()
        loss = (output.to_local() * weights.chunk(size, -1)[rank]).sum()
    else:
        loss = (output * weights).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    found = {"": whole.detach()}
    for name, parameter in model.named_parameters():
        settle_layout(parameter)
        grad = parameter.grad
        if grad is not None:
            # On the host, where it does not add to what the second pass takes.
            found[name] = (grad.full_tensor() if isinstance(grad, DTensor) else grad).detach().cpu()
    return found


@contextmanager
def _exact_products() -> Iterator[None]:
    """Products of matrices in fp32, whatever the user allows in training: with TF32 sums differ by 1e-4."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


def _difference(found: Tensor, expected: Tensor, scale: float) -> float:
    if found.shape != expected.shape:
        return math.inf
    difference = float((found - expected).abs().max()) / (scale + 1e-30) if expected.numel() else 0.0
    return difference if math.isfinite(difference) else math.inf


def _beginning(axes: Axes) -> str:
    return f"tried out divided over the {axes.tensor} ranks of the tensor axis, the model is not itself:"


def _remedy(plan: TensorPlan) -> str:
    first = "Leave parallel.sequence out, mark" if plan.sequence else "Mark"
    return f"{first} the layers around it 'whole' in parallel.tensor_styles, or set parallel.tensor=1"

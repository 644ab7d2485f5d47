"""What each rank does under torchrun: small models divided over all ranks, each beside the same model in one process.

Prints one JSON object on rank 0: case -> largest difference of a gradient, losses, and weights after three steps, each
of the largest entry; or the text of the refusal.
"""

import copy
import json
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from efftrain.errors import ConfigError
from efftrain.parallel import Plan, mesh
from efftrain.training import Job, Objective, OptimizerConfig, StepConfig, cross_entropy

SYMBOLS, WIDTH, LENGTH = 16, 8, 4


class Attention(nn.Module):
    """Fewer keys and values than queries, a learned temperature, and an MLP: seven layers to be scattered in order."""

    share = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(SYMBOLS, WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, width) for width in (WIDTH, 4, 4, WIDTH))
        self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)
        self.head = nn.Linear(WIDTH, SYMBOLS)
        self.scale = nn.Parameter(torch.tensor([1.3]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.emb(x)
        q, k, v = (layer(x).unflatten(-1, (-1, 2)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        x = x + self.o(attended.transpose(1, 2).flatten(2))
        result: Tensor = self.head(x + self.share * self.scale * self.down(F.gelu(self.up(x))))
        return result


class Tied(nn.Module):
    """The last layer has the weights of the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(SYMBOLS, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)
        self.head = nn.Linear(WIDTH, SYMBOLS, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.emb(x)
        result: Tensor = self.head(x + self.down(torch.tanh(self.up(x))))
        return result


class Centered(Attention):
    """What is between the divided layers looks at all positions."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.emb(x)
        x = x + self.down(F.gelu(self.up(x)))
        result: Tensor = self.head(x - x.mean(1, keepdim=True))
        return result


class Faint(Attention):
    """What the parameter scales hardly matters, and so its gradient is a thousandth of others."""

    share = 1e-3


class Learned(nn.Module):
    """A parameter meets the parts of a divided layer."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(SYMBOLS, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)
        self.head = nn.Linear(WIDTH, SYMBOLS)
        self.scale = nn.Parameter(torch.tensor([1.3]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.emb(x)
        result: Tensor = self.head(x + self.down(torch.tanh(self.up(x)) * self.scale))
        return result


def squares(model: nn.Module, inputs: Tensor, _: Tensor) -> Tensor:
    output: Tensor = model(inputs)
    return (output**2).mean()


def smoothed(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), label_smoothing=0.1)


CASES: dict[str, tuple[Callable[[], nn.Module], Plan, Objective]] = {
    "attention": (Attention, Plan(tensor=2), cross_entropy),
    "attention, squares": (Attention, Plan(tensor=2), squares),
    "attention, smoothed": (Attention, Plan(tensor=2), smoothed),
    "tied": (Tied, Plan(tensor=2), cross_entropy),
    "learned": (Learned, Plan(tensor=2), cross_entropy),
    "pipeline": (Attention, Plan(tensor=1, pipeline=2, microbatches=2), cross_entropy),
    "centered": (Centered, Plan(tensor=2, sequence=True), cross_entropy),
    "gain": (Attention, Plan(tensor=2, sequence=True), cross_entropy),
    "faint gain": (Faint, Plan(tensor=2, sequence=True), cross_entropy),
    "tied, divided": (Tied, Plan(tensor=2, tensor_styles={"head": "columns"}), cross_entropy),
}


def compare(make: Callable[[], nn.Module], plan: Plan, objective: Objective) -> list[float] | str:
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(SYMBOLS, (8, LENGTH + 1), generator=generator)
    inputs, targets = text[:, :-1], text[:, 1:]
    torch.manual_seed(mesh.rank())  # the ranks begin with other weights: all take those of rank 0
    model = make()
    torch.manual_seed(0)
    optimizer = OptimizerConfig(name="sgd", lr=0.1)
    alone = Job(make(), objective=objective, optimizer=optimizer)
    step = StepConfig(check_replicas_every=1)
    try:
        job = plan.apply(copy.deepcopy(model), inputs, objective=objective, optimizer=optimizer, step=step)
    except ConfigError as error:
        return str(error)
    differences = [0.0, 0.0, 0.0]
    names = dict(alone.model.named_parameters(remove_duplicate=False))
    for number in range(3):
        found, expected = job.step(inputs, targets), alone.step(inputs, targets)
        differences[1] = max(differences[1], abs(found.loss - expected.loss))
        if number == 0:
            differences[0] = largest(job.model, names, lambda p: p.grad)
    differences[2] = largest(job.model, names, lambda p: p.detach())
    return differences


def largest(model: nn.Module, names: dict[str, nn.Parameter], what: Callable[[Tensor], Tensor | None]) -> float:
    scale = max(float(value.abs().max()) for p in names.values() if (value := what(p)) is not None)
    found = 0.0
    for name, parameter in model.named_parameters():
        value, expected = what(parameter), what(names[name])
        assert value is not None, name
        assert expected is not None, name
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        found = max(found, float((whole - expected).abs().max()) / scale)
    return found


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    results = {name: compare(*case) for name, case in CASES.items()}
    if mesh.rank() == 0:
        print(json.dumps(results), flush=True)


if __name__ == "__main__":
    with mesh.process_group(timeout_s=60):
        main()

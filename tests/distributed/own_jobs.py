"""What ranks do with models as users write them: layers that share a weight, scalars, batch norm."""

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from efftrain.errors import ConfigError
from efftrain.parallel import Plan, mesh
from efftrain.parallel.axes import Axes
from efftrain.training import Job, OptimizerConfig
from tests.distributed import grid_jobs
from tests.distributed.jobs import in_group

Facts = dict[str, Any]

OPTIMIZER = OptimizerConfig(name="adamw", lr=0.05)


class Tied(nn.Module):
    """Two layers with one weight, as ``head.weight = embedding.weight`` makes them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layer, self.head = nn.Embedding(16, 8), nn.Linear(8, 8), nn.Linear(8, 16, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.tanh(self.layer(self.embedding(x))))
        return y


def tied() -> Tied:
    torch.manual_seed(0)
    return Tied()


def tokens(step: int) -> tuple[Tensor, Tensor]:
    found = torch.randint(16, (8, 5), generator=torch.Generator().manual_seed(step))
    return found[:, :-1], found[:, 1:]


def losses_of(model: nn.Module, num_steps: int) -> list[float]:
    """On one process."""
    job = Job(copy.deepcopy(model), optimizer=OPTIMIZER)
    return [job.step(*tokens(step)).loss for step in range(num_steps)]


@in_group
def go_on(settings: dict[str, Any], folder: str, num_steps: int) -> Facts:
    """Load what is there, do some steps, save."""
    job = Plan(**settings).apply(tied(), tokens(0)[0], optimizer=OPTIMIZER)
    job.load(Path(folder))
    first = job.num_steps
    losses = [job.step(*job.share(*tokens(step))).loss for step in range(first, first + num_steps)]
    job.save(Path(folder))
    return {"rank": mesh.rank(), "first": first, "losses": losses}


@in_group
def apply_elsewhere() -> str:
    """A model on another device than this rank's."""
    try:
        Plan().apply(tied().to("meta"))
    except ConfigError as error:
        return str(error)
    return "applied"


@in_group
def apply_something_else(settings: list[dict[str, Any]]) -> str:
    """Each rank has its own plan and, under ``lr``, its own learning rate."""
    own = dict(settings[mesh.rank()])
    optimizer = OptimizerConfig(lr=own.pop("lr", 0.1))
    try:
        Plan(**own).apply(tied(), tokens(0)[0], optimizer=optimizer)
    except ConfigError as error:
        return str(error)
    return "applied"


class Block(nn.Module):
    """Blocks of its own in a list, and a parameter beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.gain = nn.ModuleList(nn.Linear(8, 8) for _ in range(2)), nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x) * self.gain)
        return x


def nested() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(16, 8), InOrder(Block(), Block()), nn.Linear(8, 16))


class InOrder(nn.ModuleList):
    """A list that can be called."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = block(x)
        return x


@in_group
def sharded_in_each_other() -> list[float]:
    """Losses of blocks that hold blocks."""
    job = Plan(shard="full").apply(nested(), optimizer=OPTIMIZER)
    return [job.step(*job.share(*tokens(step))).loss for step in range(3)]


def frozen() -> nn.Module:
    """The embedding and all blocks but the last are not trained."""
    model = nested()
    model[0].requires_grad_(False)  # type: ignore[index]
    model[1][0].requires_grad_(False)  # type: ignore[index]
    return model


@in_group
def frozen_in_a_pipeline() -> list[float]:
    """Losses where the first stage holds what is frozen."""
    job = Plan(pipeline=2).apply(frozen(), tokens(0)[0], optimizer=OPTIMIZER)
    return [job.step(*job.share(*tokens(step))).loss for step in range(3)]


def sequential() -> nn.Module:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)]
    return nn.Sequential(nn.Embedding(16, 8), InOrder(*blocks), nn.Linear(8, 16))


@in_group
def recompute_in_a_pipeline(settings: dict[str, Any]) -> tuple[list[float], list[str], int]:
    """Losses, what this rank still has weights of, and how often its blocks went forward in one step."""
    model = sequential()
    plan = Plan(pipeline=2, microbatches=2, schedule="interleaved_1f1b", **settings)
    job = plan.apply(model, tokens(0)[0], optimizer=OPTIMIZER)
    here = [name for name, parameter in model.named_parameters() if not parameter.is_meta]
    losses = [job.step(*job.share(*tokens(step))).loss for step in range(3)]
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    for module in model.modules():
        if isinstance(module, nn.Linear) and module.out_features == 8:
            module.register_forward_pre_hook(count)
    job.step(*job.share(*tokens(3)))
    return losses, here, calls


@in_group
def batch_norm_in(settings: dict[str, Any]) -> list[str]:
    """What is warned of."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        Plan(**settings).apply(model, torch.randn(8, 8))
    return [str(one.message) for one in told if "BatchNorm" in str(one.message)]


@in_group
def export(settings: dict[str, Any], path: str) -> list[str]:
    """Train twice and export; what is left in the folder then."""
    is_tied = settings.pop("model") == "tied"
    model, batch = (tied(), tokens) if is_tied else (grid_jobs.model(), grid_jobs.batch)
    job = Plan(**settings).apply(model, batch(0)[0], optimizer=grid_jobs.OPTIMIZER)
    for step in range(2):
        job.step(*job.share(*batch(step)))
    job.export(Path(path))
    return sorted(file.name for file in Path(path).parent.iterdir())


@in_group
def leave_the_data_axis() -> None:
    """Rank 3 is gone while rank 2 waits for it."""
    axes = Axes.make(torch.device("cpu"), pipeline=2, data=2, tensor=1, shard=1)
    if mesh.rank() == 2:
        axes.transport("data").all_reduce(torch.zeros(3)).wait()

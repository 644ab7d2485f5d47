"""What the ranks of the grid test do: many plans in one group, each against one process."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from efftrain.compression import parse_codec
from efftrain.errors import ConfigError, DataError
from efftrain.models import build_model
from efftrain.parallel import Plan, SyncConfig, mesh
from efftrain.training import Job, OptimizerConfig, StepConfig
from efftrain.training.checkpoint import Saver, load_checkpoint
from tests.distributed.jobs import in_group

Facts = dict[str, Any]
Settings = Mapping[str, Any]

SAMPLES = 8
OPTIMIZER = OptimizerConfig(lr=0.1)
KINDS = ("tied", "unused")
"""Settings that change the model, not the plan."""


def model(tied: bool = False, unused: bool = False) -> torch.nn.Module:
    """With ``unused``, some of it takes part in nothing."""
    torch.manual_seed(0)
    found = build_model("char-transformer", vocab=32, context=8, width=16, depth=4, heads=2, tied=tied)
    if unused:
        found.spare = torch.nn.Linear(3, 2)
        found.get_submodule("blocks.1").register_parameter("scale", torch.nn.Parameter(torch.randn(5)))
    return found


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(32, (SAMPLES, 9), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def plan_of(settings: Settings) -> Plan:
    sync = SyncConfig(node_size=settings.get("node_size", 1))
    settings = {name: value for name, value in settings.items() if name not in ("precision", "node_size", *KINDS)}
    return Plan(**{**settings, "codec": parse_codec(settings.get("codec", "Identity()")), "sync": sync})


def kind_of(settings: Settings) -> dict[str, bool]:
    """Arguments of ``model``."""
    return {name: True for name in KINDS if settings.get(name, False)}


def job_of(settings: Settings) -> Job:
    step = StepConfig(check_replicas_every=1, precision=settings.get("precision", "fp32"))
    whole = model(**kind_of(settings))
    return plan_of(settings).apply(whole, batch(0)[0], optimizer=OPTIMIZER, step=step)


def step_of(job: Job, step: int) -> Any:
    return job.step(*job.share(*batch(step)))


def one_process(num_steps: int, **kind: bool) -> Facts:
    """Gradients of the first step by name, losses and norms."""
    job = Job(model(**kind), optimizer=OPTIMIZER)
    results = []
    grads = {}
    for step in range(num_steps):
        results.append(job.step(*batch(step)))
        if step == 0:
            grads = {name: p.grad.clone() for name, p in job.model.named_parameters() if p.grad is not None}
    return {"grads": grads, "losses": [r.loss for r in results], "norms": [r.grad_norm for r in results]}


@in_group
def label_out_of_range(settings: Settings, label: int) -> str:
    """The error of a step whose labels hold one that is no class."""
    job = job_of(settings)
    inputs, targets = batch(0)
    targets = targets.clone()
    targets[:, 2] = label
    try:
        result = job.step(*job.share(inputs, targets))
    except DataError as error:
        return str(error)
    return f"trained: {result.loss}"


class Detached(torch.nn.Module):
    """The last layer uses the weights of the first, and gives them no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = torch.nn.Embedding(32, 8)
        self.up, self.down = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(torch.relu(self.up(self.emb(x))))
        return torch.nn.functional.linear(x, self.emb.weight.detach())


@in_group
def detached(settings: Settings, num_steps: int) -> dict[str, float]:
    """Sums of this rank's parameters after some steps, with replicas compared after each."""
    torch.manual_seed(0)
    step = StepConfig(check_replicas_every=1)
    job = plan_of(settings).apply(Detached(), batch(0)[0], optimizer=OPTIMIZER, step=step)
    for number in range(num_steps):
        step_of(job, number)
    return {name: float(p.detach().double().sum()) for name, p in job.model.named_parameters()}


@in_group
def cells(plans: Sequence[Settings], num_steps: int = 3) -> list[Facts]:
    """Of each plan: largest error of a gradient relative to the largest entry of all, losses and norms; or why not."""
    references = {tied: one_process(num_steps, tied=tied) for tied in {plan.get("tied", False) for plan in plans}}
    found = []
    for settings in plans:
        expected = references[settings.get("tied", False)]
        try:
            found.append(_cell(settings, expected, num_steps))
        except Exception as error:
            raise AssertionError(f"{dict(settings)}: {error}") from error
    return found


def _cell(settings: Settings, expected: Facts, num_steps: int) -> Facts:
    try:
        job = job_of(settings)
    except ConfigError as error:
        return {"refused": str(error)}
    results, facts = [], {}
    for step in range(num_steps):
        results.append(step_of(job, step))
        if step == 0:
            facts = _compare(job, expected["grads"], int(settings.get("tensor", 1)))
    return {
        **facts,
        "losses": max(abs(r.loss - x) for r, x in zip(results, expected["losses"], strict=True)),
        "norms": max(abs(r.grad_norm / x - 1) for r, x in zip(results, expected["norms"], strict=True)),
    }


def _compare(job: Job, expected: Mapping[str, Tensor], tensor: int) -> Facts:
    """The error of what was exchanged, and of that plus what all replicas keep for later."""
    residuals = _mean_residuals(job, tensor)
    scale = max(float(grad.abs().max()) for grad in expected.values())
    error = owed = 0.0
    names = []
    for name, parameter in job.model.named_parameters():
        assert parameter.grad is not None, name
        names.append(name)
        grad = parameter.grad
        error = max(error, float((_whole(grad) - expected[name]).abs().max()) / scale)
        own = grad.to_local() if isinstance(grad, DTensor) else grad
        total = own + residuals.get(name, torch.zeros(own.numel())).view_as(own)
        if isinstance(grad, DTensor):
            total = DTensor.from_local(total, grad.device_mesh, grad.placements, shape=grad.shape, stride=grad.stride())
        owed = max(owed, float((_whole(total) - expected[name]).abs().max()) / scale)
    return {"error": error, "with_residuals": owed, "names": names}


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _mean_residuals(job: Job, tensor: int) -> dict[str, Tensor]:
    """Of the ranks with this rank's place on the tensor axis: what each parameter is owed."""
    everyone: list[Any] = [None] * mesh.world_size()
    own = {k.partition("/")[2]: v for k, v in job.exchange.state_dict().items() if k.startswith("residual/")}
    dist.all_gather_object(everyone, own)
    total: dict[str, Tensor] = {}
    for rank, found in enumerate(everyone):
        if rank % tensor == mesh.rank() % tensor:
            for name, value in found.items():
                total[name] = total.get(name, torch.zeros_like(value)) + value / job.exchange.num_replicas
    return total


@in_group
def train_and_save(settings: Settings, folder: str, num_steps: int, background: bool = False) -> Facts:
    """Load what is there, some steps, and a checkpoint."""
    job = job_of(settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        restored = load_checkpoint(Path(folder), job, seed=0)
    first = job.num_steps
    with torch.random.fork_rng():
        draw = float(torch.rand(()))
    losses = [step_of(job, step).loss for step in range(first, first + num_steps)]
    saver = Saver(Path(folder), job, background=background)
    saver.save()
    if background:  # what is written is the state of before
        step_of(job, first + num_steps)
    saver.finish()
    return {
        "losses": losses,
        "first": first,
        "draw": draw,
        "replica": job.exchange.replica,
        "restored": restored is not None,
        "owed": job.exchange.residual_norm(),
        "warnings": [str(warning.message) for warning in caught],
    }

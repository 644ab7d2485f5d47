"""What the ranks of a test do. A function returns plain facts; the tests judge them."""

import functools
import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ParamSpec, TypeVar
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from efftrain.compression import parse_codec
from efftrain.config import load_recipe
from efftrain.data.digits import load_digits
from efftrain.errors import EfftrainError
from efftrain.parallel import ClusterRecipe, Plan, mesh, train
from efftrain.parallel.data import DataParallel
from efftrain.parallel.sync import GradSync, SyncConfig
from efftrain.training import Job, OptimizerConfig, StepConfig, cross_entropy, evaluate
from efftrain.training.checkpoint import load_checkpoint
from tests.distributed.workload import Net

Facts = dict[str, Any]

NUM_STEPS = 8
GLOBAL_BATCH = 32
SGD = OptimizerConfig(lr=0.1, momentum=0.9, schedule="constant")
NUMBERS = ("num_steps", "node_size")  # of an exchange's state, beside its tensors
SMALL_BUCKET_MB = 0.001  # three buckets


def model_of(seed: int = 0, *, norm: bool = False) -> Net:
    """Equal on all ranks, without dropout."""
    torch.manual_seed(seed)
    return Net(width=24, dropout=0.0, norm=norm)


def batch(step: int, rank: int = 0, world_size: int = 1) -> tuple[Tensor, Tensor]:
    """A rank's share of the batch of a step."""
    digits = load_digits("train")
    indices = np.random.default_rng([7, step]).permutation(len(digits))[:GLOBAL_BATCH]
    share = GLOBAL_BATCH // world_size
    inputs, targets = digits.batch(indices[rank * share : (rank + 1) * share])
    return torch.from_numpy(inputs), torch.from_numpy(targets)


def weights(model: nn.Module) -> dict[str, Any]:
    """NumPy copies of all parameters."""
    return {name: value.detach().numpy().copy() for name, value in model.named_parameters()}


def digest(tensors: dict[str, Any]) -> str:
    """Equal for equal bits."""
    joined = b"".join(name.encode() + np.ascontiguousarray(tensors[name]).tobytes() for name in sorted(tensors))
    return hashlib.sha256(joined).hexdigest()


@contextmanager
def counting_buckets(buckets: list[int]) -> Iterator[None]:
    """Exchanges inside append the number of each bucket that they start."""
    original = GradSync._start_next

    def start_next(self: GradSync) -> None:
        buckets.append(self._num_started)
        original(self)

    with patch.object(GradSync, "_start_next", start_next):
        yield


def run(
    codec: str,
    *,
    correction: bool = False,
    micro_batches: int = 1,
    bucket_mb: float | None = None,
    poison: tuple[int, int] | None = None,
    bad_gradient: tuple[int, int] | None = None,
    leave_out: int | None = None,
    num_steps: int = NUM_STEPS,
    norm: bool = False,
    sync: SyncConfig | None = None,
) -> Facts:
    """A few steps under a plan.

    ``poison`` is (step, rank) of a NaN in the inputs, ``bad_gradient`` of one in the gradient behind a finite loss;
    ``leave_out`` is a step that is not made.
    """
    now = -1

    def objective(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        loss = cross_entropy(model, inputs, targets)
        if bad_gradient == (now, mesh.rank()):
            loss = loss + (0 * loss).sqrt()  # 0, with the derivative 0 * inf
        return loss

    rank, world_size = mesh.rank(), mesh.world_size()
    sync = replace(sync or SyncConfig(), bucket_mb=bucket_mb)
    plan = Plan(codec=parse_codec(codec), momentum_correction=correction, sync=sync)
    model = model_of(norm=norm)
    buckets: list[int] = []
    config = StepConfig(micro_batches=micro_batches, check_replicas_every=1)
    job = plan.apply(model, objective=objective, optimizer=SGD, step=config, seed=3)
    exchange = job.exchange
    assert isinstance(exchange, DataParallel | GradSync)
    num_sparse = 0
    facts: Facts = {"losses": [], "skipped": [], "stats": [], "harmed": [], "buckets": buckets}
    for step in range(num_steps):
        if step == leave_out:
            continue
        now = step
        inputs, targets = batch(step, rank, world_size)
        if poison == (step, rank):
            inputs[0] = math.nan
        before = {**exchange.state_dict(), **job.state_dict()[0]}
        before = {name: value.clone() for name, value in before.items() if name not in NUMBERS}
        with counting_buckets(buckets):
            result = job.step(inputs, targets)
        num_sparse = sum(parameter.grad is None for parameter in model.parameters())
        after = {**exchange.state_dict(), **job.state_dict()[0]}
        if result.skipped:
            facts["harmed"] += [name for name in before if not torch.equal(before[name], after[name])]
            facts["harmed"] += [name for name in after if name not in before and name not in NUMBERS]
        facts["losses"].append(result.loss)
        facts["skipped"].append(result.skipped)
        facts["stats"].append({k: v for k, v in exchange.stats().items() if k.endswith("bytes")})
    facts["num_sparse"] = num_sparse
    facts["weights"] = weights(model)
    facts["digest"] = digest(facts["weights"])
    facts["feedback"] = {k: v.numpy().copy() for k, v in exchange.state_dict().items() if k not in NUMBERS}
    facts["sizes"] = {name: p.numel() for name, p in model.named_parameters()}
    return facts


def plain_ddp() -> Facts:
    """The same steps by torch alone."""
    model = model_of()
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=SGD.lr, momentum=SGD.momentum)
    for step in range(NUM_STEPS):
        inputs, targets = batch(step, mesh.rank(), mesh.world_size())
        optimizer.zero_grad()
        nn.functional.cross_entropy(wrapped(inputs), targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return {"weights": weights(model), "digest": digest(weights(model))}


def one_process() -> Facts:
    """The same steps with the whole batch in one process."""
    model = model_of()
    job = Job(model, optimizer=SGD)
    losses = [job.step(*batch(step)).loss for step in range(NUM_STEPS)]
    return {"weights": weights(model), "losses": losses}


def sparse_by_hand(ratio: float, momentum_before: bool) -> Facts:
    """Top-k with error feedback for two ranks in plain NumPy, from the papers' formulas."""
    world_size = mesh.world_size()
    models = [model_of() for _ in range(world_size)]
    names = [name for name, _ in models[0].named_parameters()]
    owed = [dict.fromkeys(names, 0.0) for _ in range(world_size)]
    speed = [dict.fromkeys(names, 0.0) for _ in range(world_size)]
    after = dict.fromkeys(names, 0.0)
    for step in range(NUM_STEPS):
        sent: dict[str, Any] = dict.fromkeys(names, 0.0)
        for rank, model in enumerate(models):
            model.zero_grad()
            inputs, targets = batch(step, rank, world_size)
            nn.functional.cross_entropy(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
            for name, parameter in model.named_parameters():
                assert parameter.grad is not None
                value: Any = parameter.grad.numpy().ravel().astype(np.float64)
                if momentum_before:
                    value = speed[rank][name] = 0.9 * speed[rank][name] + value
                value = value + owed[rank][name]
                k = max(1, round(ratio * value.size))
                chosen = np.argsort(-np.abs(value), kind="stable")[:k]
                message = np.zeros_like(value)
                message[chosen] = value[chosen]
                owed[rank][name] = value - message
                sent[name] = sent[name] + message / world_size
        for model in models:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if model is models[0]:
                        after[name] = sent[name] if momentum_before else 0.9 * after[name] + sent[name]
                    move = torch.from_numpy(np.asarray(0.1 * after[name])).float()
                    parameter.sub_(move.view_as(parameter))
    return {"weights": weights(models[0])}


def statistics_and_evaluation() -> Facts:
    """Batch norm: each rank's running statistics come from its own samples."""
    model = model_of(norm=True)
    job = Plan().apply(model, optimizer=SGD)
    for step in range(NUM_STEPS):
        job.step(*batch(step, mesh.rank(), mesh.world_size()))
    found = evaluate(job, load_digits("test"), 50)
    alone = Job(model)
    whole = evaluate(alone, load_digits("test"), 50)
    return {
        "buffers": digest({name: value.numpy() for name, value in model.named_buffers()}),
        "found": (found.loss, found.accuracy),
        "whole": (whole.loss, whole.accuracy),
    }


def endless_nan() -> Facts:
    """NaN on rank 1 in every step."""
    job = Plan(codec=parse_codec("TopK(0.1)")).apply(model_of(), optimizer=SGD)
    for step in range(40):
        inputs, targets = batch(step, mesh.rank(), mesh.world_size())
        if mesh.rank() == 1:
            inputs[0] = math.nan
        try:
            job.step(inputs, targets)
        except EfftrainError as error:
            return {"step": step, "error": f"{type(error).__name__}: {error}"}
    return {"step": None}


P = ParamSpec("P")
R = TypeVar("R")


def in_group(function: Callable[P, R]) -> Callable[P, R]:
    """Run in the group of all ranks; what the function made is gone before the group ends."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with mesh.process_group(timeout_s=30):
            return function(*args, **kwargs)

    return run


@in_group
def all_facts() -> dict[str, Facts]:
    """Everything that fits into one group of processes."""
    facts = {
        "ddp": plain_ddp(),
        "one": one_process(),
        "identity": run("Identity()"),
        "identity micro": run("Identity()", micro_batches=4),
        "identity nan": run("Identity()", poison=(3, 1)),
        "identity left out": run("Identity()", leave_out=3),
        "all": run("TopK(1.0)"),
        "int8": run("Int8(block=32, rounding='stochastic')"),
        "top-k": run("TopK(0.1)"),
        "top-k by hand": sparse_by_hand(0.1, momentum_before=False),
        "corrected": run("TopK(0.1)", correction=True),
        "corrected by hand": sparse_by_hand(0.1, momentum_before=True),
        "entries": run("TopK(0.05)", correction=True),
        "entries by hand": sparse_by_hand(0.05, momentum_before=True),
        "entries nan": run("TopK(0.05)", correction=True, poison=(3, 1), bucket_mb=SMALL_BUCKET_MB),
        "entries left out": run("TopK(0.05)", correction=True, leave_out=3),
        "sparse": run("TopK(0.1) >> Int8(block=16)", correction=True),
        "sparse small buckets": run("TopK(0.1) >> Int8(block=16)", correction=True, bucket_mb=SMALL_BUCKET_MB),
        "sparse micro": run("TopK(0.1) >> Int8(block=16)", correction=True, micro_batches=4),
        "sparse nan": run("TopK(0.1) >> Int8(block=16)", correction=True, poison=(3, 1), bucket_mb=SMALL_BUCKET_MB),
        "sparse left out": run("TopK(0.1) >> Int8(block=16)", correction=True, leave_out=3),
        "sparse bad gradient": run("TopK(0.1) >> Int8(block=16)", correction=True, bad_gradient=(3, 1)),
        "identity bad gradient": run("Identity()", bad_gradient=(3, 1)),
        "nan in step 0": run("TopK(0.1) >> Int8(block=16)", correction=True, poison=(0, 0)),
        "left out 0": run("TopK(0.1) >> Int8(block=16)", correction=True, leave_out=0),
        "norm nan": run("Identity()", poison=(3, 1), norm=True),
        "statistics": statistics_and_evaluation(),
        "endless nan": endless_nan(),
    }
    dist.barrier()
    return facts


@in_group
def digests_of_codecs() -> dict[str, str]:
    """Weights after a few steps; 30 samples a batch, for three ranks."""
    codecs = ("Identity()", "TopK(0.1)", "TopK(0.1) >> Int8(block=16)", "Int8(block=32, rounding='stochastic')")
    return {codec: run(codec, bucket_mb=SMALL_BUCKET_MB)["digest"] for codec in codecs}


def train_recipe(recipe: str, overrides: list[str], out: str, resume: bool = False) -> dict[str, Any] | None:
    """A whole run, as the command line makes it."""
    return train(load_recipe(ClusterRecipe, recipe, overrides), out=Path(out), resume=resume)


@in_group
def load_only(checkpoints: str, codec: str) -> Facts:
    """A fresh job of the recipe's model with a checkpoint loaded into it."""
    model = Net(width=24)
    job = Plan(codec=parse_codec(codec)).apply(model, optimizer=SGD)
    restored = load_checkpoint(Path(checkpoints), job, seed=0)
    assert restored is not None
    tensors, _ = job.state_dict()
    return {
        "step": restored.step,
        "shared": {name: value.numpy().copy() for name, value in tensors.items()},
        "feedback": {k: v.numpy().copy() for k, v in job.exchange.state_dict().items() if k not in NUMBERS},
        "random": torch.rand(3).tolist(),
    }


@in_group
def save_where_rank_1_cannot(folder: str) -> str:
    """Save once; then save again while rank 1 has no disk."""
    from efftrain.training import checkpoint

    job = Plan(codec=parse_codec("TopK(0.1)")).apply(model_of(), optimizer=SGD)
    job.step(*batch(0, mesh.rank(), mesh.world_size()))
    checkpoint.save_checkpoint(Path(folder), job)
    job.step(*batch(1, mesh.rank(), mesh.world_size()))
    if mesh.rank() == 1:
        checkpoint._write = _full_disk
    try:
        checkpoint.save_checkpoint(Path(folder), job)
    except EfftrainError as error:
        return f"{type(error).__name__}: {error}"
    return "saved"


def _full_disk(path: Path, data: bytes) -> None:
    raise OSError(28, "No space left on device", str(path))

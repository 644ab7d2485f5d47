"""What the ranks of the exchange's tests do."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from efftrain.compression import Feedback, parse_codec
from efftrain.errors import EfftrainError
from efftrain.parallel import Plan, mesh
from efftrain.parallel.collectives import ALGORITHMS, Link, Piece, hierarchical, low_rank
from efftrain.parallel.hooks import run as drive
from efftrain.parallel.sync import GradSync, SyncConfig
from efftrain.training import Job, OptimizerConfig, StepConfig
from tests.distributed.jobs import NUMBERS, batch, in_group, model_of, run

Facts = dict[str, Any]

EVERY_CODEC = (
    "Identity()",
    "Half()",
    "Int8()",
    "IntN(4)",
    "Fp8()",
    "Mx('e2m1')",
    "Sign()",
    "Ternary()",
    "TopK(0.05, dense_below=32)",
    "TopK(0.05) >> Int8()",
    "RandomK(0.1)",
    "Threshold(0.1)",
    "LowRank(2)",
)
SHAPES = ((6, 5), (7,), (1,), (8, 3, 3))


@in_group
def exchange_by_hand(codec: str, algorithm: str, num_steps: int = 3, node_size: int = 1) -> list[Facts]:
    """A few exchanges of known gradients: what went in, what came out, what is left, of every parameter."""
    chosen = parse_codec(codec)
    world = mesh.transport(torch.device("cpu"))
    feedback = Feedback()
    inside, between = world.split(node_size) if node_size > 1 else (None, world)
    link = Link(between, feedback, 1 / world.world_size)
    facts = []
    for step in range(num_steps):
        rng = np.random.default_rng([step, world.rank])
        gradients = [rng.normal(size=shape).astype(np.float32).ravel() for shape in SHAPES]
        outs = [np.full_like(g, np.nan) for g in gradients]
        pieces = [
            Piece(f"p{i}", chosen.for_tensor(shape), g, out, 0, g.size)
            for i, (shape, g, out) in enumerate(zip(SHAPES, gradients, outs, strict=True))
        ]
        link.seed = step
        function = low_rank if algorithm == "low_rank" else ALGORITHMS[algorithm]
        if inside is None:
            drive(function(pieces, link))
        else:
            drive(hierarchical(pieces, Link(inside, feedback, 1.0), link, function))
        before = feedback.state_dict()
        feedback.commit()
        facts.append(
            {"in": gradients, "out": [o.copy() for o in outs], "before": before, "after": feedback.state_dict()}
        )
    return facts


@in_group
def many_steps(num_steps: int, bucket_mb: float) -> Facts:
    """Every codec for a while in one group: equal replicas, finite losses, nothing hangs."""
    facts = {}
    for codec in EVERY_CODEC:
        found = run(codec, num_steps=num_steps, bucket_mb=bucket_mb)
        facts[codec] = {"digest": found["digest"], "losses": found["losses"], "skipped": sum(found["skipped"])}
    return facts


@in_group
def variants() -> Facts:
    """Forms of the exchange that must agree, or must not matter."""
    top = "TopK(0.1) >> Int8(block=16)"
    return {
        "gather": run(top, sync=SyncConfig(algorithm="gather")),
        "two_phase": run(top, sync=SyncConfig(algorithm="two_phase")),
        "all gathered": run("TopK(1.0)", sync=SyncConfig(algorithm="gather")),
        "all in two phases": run("TopK(1.0)", sync=SyncConfig(algorithm="two_phase")),
        "all in nodes": run("TopK(1.0)", sync=SyncConfig(node_size=2)),
        "all in whole buckets": run("TopK(1.0)", sync=SyncConfig(whole_buckets=True), bucket_mb=0.001),
        "whole": run(top, sync=SyncConfig(whole_buckets=True), correction=True, bucket_mb=0.001),
        "whole nan": run(top, sync=SyncConfig(whole_buckets=True), correction=True, poison=(3, 1)),
        "whole left out": run(top, sync=SyncConfig(whole_buckets=True), correction=True, leave_out=3),
        "identity": run("Identity()"),
        "nodes": run(top, sync=SyncConfig(node_size=2), correction=True, bucket_mb=0.001),
        "nodes nan": run(top, sync=SyncConfig(node_size=2), correction=True, bucket_mb=0.001, poison=(3, 3)),
        "nodes left out": run(top, sync=SyncConfig(node_size=2), correction=True, bucket_mb=0.001, leave_out=3),
        "two_phase nan": run("Int8()", sync=SyncConfig(algorithm="two_phase"), poison=(3, 1)),
        "two_phase left out": run("Int8()", sync=SyncConfig(algorithm="two_phase"), leave_out=3),
        "low rank nan": run("LowRank(2)", poison=(3, 1)),
        "low rank left out": run("LowRank(2)", leave_out=3),
        "warm-up": run("TopK(0.01)", sync=SyncConfig(warm_up_steps=4)),
        "masking": run("TopK(0.1)", sync=SyncConfig(masking=True), correction=True),
        "clipping": run("TopK(0.1)", sync=SyncConfig(local_clip=0.01)),
    }


@in_group
def refusals() -> Facts:
    """What is wrong is said before anything is sent."""

    def error_of(*arguments: Any, width: int = 24, codec: str = "Int8()", **settings: Any) -> str:
        try:
            plan = Plan(codec=parse_codec(codec), sync=SyncConfig(*arguments, **settings))
            torch.manual_seed(0)
            plan.apply(nn.Linear(4, width))
        except EfftrainError as error:
            return f"{type(error).__name__}: {error}"
        return "accepted"

    return {
        "nodes of three": error_of(node_size=3),
        "other model": error_of(width=4 + mesh.rank()),
        "whole matrices": error_of(codec="LowRank(2)", whole_buckets=True),
        "right": error_of(),
    }


@in_group
def replica_that_went_astray() -> str:
    """Rank 1 changes a weight of its own."""
    model = model_of()
    job = Plan(codec=parse_codec("Int8()")).apply(model, optimizer=OptimizerConfig())
    job.exchange.check_replicas(model)
    with torch.no_grad():
        if mesh.rank() == 1:
            model.head.bias[3] += 1e-6
    try:
        job.exchange.check_replicas(model)
    except EfftrainError as error:
        return f"{type(error).__name__}: {error}"
    return "unseen"


@in_group
def unused_parameter() -> Facts:
    """A layer that takes no part on rank 1, and one that takes part nowhere."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    sync = GradSync(parse_codec("TopK(1.0)"), mesh.transport(torch.device("cpu")), SyncConfig(bucket_mb=1e-5))
    sync.wrap(model)
    x = torch.ones(2, 4)
    y = model["a"](x)
    (model["b"](y) if mesh.rank() == 0 else y).sum().backward()
    assert sync.finish()
    assert sync.lacks_gradients
    sync.leave_out()
    return {name: p.grad.numpy().copy() for name, p in model.named_parameters() if p.grad is not None}


@in_group
def state_of(node_size: int, whole: bool, num_steps: int) -> list[dict[str, Any]]:
    """Feedback after some steps, of this rank."""
    model = model_of()
    sync = SyncConfig(node_size=node_size, whole_buckets=whole, bucket_mb=0.001)
    job = Plan(codec=parse_codec("TopK(0.1)"), sync=sync).apply(model, optimizer=OptimizerConfig())
    for step in range(num_steps):
        job.step(*batch(step, mesh.rank(), mesh.world_size()))
    return [{k: v.numpy().copy() for k, v in job.exchange.state_dict().items()}]


@in_group
def state_loaded(states: list[dict[str, Any]], node_size: int, whole: bool) -> dict[str, Any]:
    """What a rank of another layout makes of the feedback of all ranks."""
    model = model_of()
    sync = SyncConfig(node_size=node_size, whole_buckets=whole, bucket_mb=0.0005)
    job = Plan(codec=parse_codec("TopK(0.1)"), sync=sync).apply(model, optimizer=OptimizerConfig())
    job.exchange.load_state_dicts([{k: torch.from_numpy(np.asarray(v)) for k, v in s.items()} for s in states])
    return {k: v.numpy().copy() for k, v in job.exchange.state_dict().items() if k not in NUMBERS}


class Branches(nn.Module):
    """A way that all samples go, one that those of a marked batch go, and one that none goes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.some, self.never, self.last = (
            nn.Linear(6, 8),
            nn.Linear(8, 8),
            nn.Linear(8, 8),
            nn.Linear(8, 4),
        )

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs).tanh()
        if inputs[0, 0] > 0:
            hidden = hidden + self.some(hidden)
        result: Tensor = self.last(hidden.tanh())
        return result


MARKED = ((1, 0), (0, 1), (0, 0), (1, 1), (0, 0), (0, 1))
"""Of each step: which halves of the batch are marked."""


def marked_batch(step: int, micro_batches: int) -> tuple[Tensor, Tensor]:
    """Both halves. Of several micro-batches of a half, the first is marked and the others are not."""
    generator = torch.Generator().manual_seed(step)
    inputs, targets = torch.randn(16, 6, generator=generator), torch.randint(4, (16,), generator=generator)
    inputs[:, 0] = -1
    for half, marked in enumerate(MARKED[step]):
        inputs[8 * half : 8 * half + 8 // micro_batches, 0] = 2.0 * marked - 1
    return inputs, targets


def train_branches(job: Job, micro_batches: int) -> Facts:
    """Weights, losses and norms, and after each step whether the branches have gradients."""
    facts: Facts = {"losses": [], "norms": [], "some": [], "never": [], "owed": []}
    model = job.model
    assert isinstance(model, Branches)
    for step in range(len(MARKED)):
        result = job.step(*job.share(*marked_batch(step, micro_batches)))
        facts["losses"].append(result.loss)
        facts["norms"].append(result.grad_norm)
        facts["some"].append(model.some.weight.grad is not None)
        facts["never"].append(model.never.weight.grad is not None or model.never.bias.grad is not None)
        state = {name: value.numpy().copy() for name, value in job.exchange.state_dict().items() if ".weight" in name}
        facts["owed"].append({name: value for name, value in state.items() if "some" in name or "never" in name})
    facts["weights"] = {name: value.detach().numpy().copy() for name, value in model.named_parameters()}
    return facts


@in_group
def branches(optimizer: OptimizerConfig) -> dict[str, Facts]:
    """Parameters without a gradient on one rank or on all, under every exchange, beside one process."""
    facts = {}
    for pieces in (1, 2):
        # A piece of one process is what a rank has in one of its own, so that both branch alike.
        alone = StepConfig(micro_batches=2 * pieces)
        facts[f"one process, {pieces}"] = train_branches(Job(Branches(), optimizer=optimizer, step=alone), pieces)
        for name, plan in {
            "ddp": Plan(),
            "ddp, small buckets": Plan(sync=SyncConfig(bucket_mb=1e-4)),
            "gradsync": Plan(exchange="gradsync"),
            "all entries": Plan(codec=parse_codec("TopK(1.0)"), sync=SyncConfig(bucket_mb=1e-4)),
            "all entries, whole": Plan(codec=parse_codec("TopK(1.0)"), sync=SyncConfig(whole_buckets=True)),
            "sparse": Plan(codec=parse_codec("TopK(0.1)")),
            "sparse, whole": Plan(codec=parse_codec("TopK(0.1)"), sync=SyncConfig(whole_buckets=True)),
            "sparse, two phases": Plan(codec=parse_codec("TopK(0.1)"), sync=SyncConfig(algorithm="two_phase")),
            "low rank": Plan(codec=parse_codec("LowRank(2)")),
        }.items():
            job = plan.apply(Branches(), optimizer=optimizer, step=StepConfig(micro_batches=pieces))
            facts[f"{name}, {pieces}"] = train_branches(job, pieces)
    return facts


class Either(Branches):
    """Two layers of one shape, one for marked batches and one for others."""

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs).tanh()
        hidden = hidden + (self.some if inputs[0, 0] > 0 else self.never)(hidden)
        result: Tensor = self.last(hidden.tanh())
        return result


@in_group
def divided_branches() -> str:
    """With divided weights: torch itself would add the gradients of one layer to those of another."""
    job = Plan(shard="full").apply(Either(), optimizer=OptimizerConfig())
    found = [name for step in (3, 2) for name in _trained_by(job, step)]
    assert found == ["some", "never"], found
    try:
        _trained_by(job, 0)
    except EfftrainError as error:
        return f"{type(error).__name__}: {error}"
    return "unseen"


def _trained_by(job: Job, step: int) -> list[str]:
    job.step(*job.share(*marked_batch(step, 1)))
    return [name for name in ("some", "never") if job.model.get_submodule(name).weight.grad is not None]

"""A cluster recipe, and its run: what ``efftrain train RECIPE`` and ``torchrun parallel/train.py RECIPE`` do."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import nn

from efftrain.compression import format_codec, parse_codec
from efftrain.config import load_recipe, to_dict
from efftrain.data import Dataset, load_dataset
from efftrain.errors import CheckpointError, ConfigError
from efftrain.models import build_model, load_pretrained
from efftrain.models.pretrained import Pretrained
from efftrain.parallel import launched, mesh
from efftrain.parallel.agreement import NOTHING, check_agreement, facts_of, plain
from efftrain.parallel.layout import Layout
from efftrain.parallel.pipeline import Schedule
from efftrain.parallel.plan import Plan
from efftrain.parallel.recompute import Checkpointing
from efftrain.parallel.sync import SyncConfig
from efftrain.report.run import RunFolder, check_tensorboard, claim_run, next_run_number, run_path
from efftrain.training import (
    Distillation,
    Job,
    LoopConfig,
    Objective,
    OptimizerConfig,
    StepConfig,
    StepResult,
    check_distillation,
    check_fit,
    cross_entropy,
    fit,
    set_seed,
)
from efftrain.training.checkpoint import complete_checkpoints, load_model

OnStep: TypeAlias = Callable[[int, int, StepResult], None]
"""Called with updates done, updates in all, and the result of the last."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model."""

    name: str
    """A shipped family (``watch-cnn``, ...) or ``path/to/file.py:Class``."""
    options: dict[str, int | float | str | bool | tuple[int, ...]] = field(default_factory=dict)
    """Arguments of the family."""
    pretrained: str | None = None
    """Folder written by ``save_pretrained``; start from its weights."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which data."""

    name: str
    """A shipped set (``watch``, ``digits``, ``fashion-mnist``, ``pytext``) or ``path/to/file.py:name``."""
    options: dict[str, int | float | str | bool] = field(default_factory=dict)
    """Arguments of its loader, e.g. ``people = 8`` of ``watch``."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """The plan, as a recipe writes it."""

    data: int | None = None
    """Replicas; left out: all processes that the other axes leave."""
    tensor: int = 1
    """Ranks that divide the layers of a replica; neighbors, on a fast link."""
    pipeline: int = 1
    """Ranks that hold consecutive layers each."""
    shard: Literal["none", "grads", "full"] = "none"
    """Divide weights over the data axis: ``full`` gathers each layer when it is needed, ``grads`` once a step."""
    shard_size: int | None = None
    """Ranks that share one copy of sharded weights; left out: the whole data axis."""
    schedule: Schedule = "1f1b"
    """In which order a pipeline works: ``gpipe``, ``1f1b``, ``interleaved_1f1b``, ``interleaved_zero_bubble``, ``zbv``
    or ``dualpipev``."""
    microbatches: int | None = None
    """Pieces of a replica's batch in the pipeline; left out: two for each of its ranks."""
    sequence: bool = False
    """Divide positions over the tensor axis where layers are not divided."""
    tensor_styles: dict[str, str] = field(default_factory=dict)
    """Module name -> ``columns``, ``rows``, ``entries``, ``classes`` or ``whole``, against what was found."""
    checkpointing: Checkpointing = "none"
    """Compute activations of blocks again in the backward pass: ``selective`` or ``full``, for less memory."""
    compile: bool = False
    """Compile blocks with ``torch.compile``."""
    exchange: Literal["auto", "ddp", "gradsync"] = "auto"
    """What averages gradients: torch's DDP, our GradSync; ``auto`` is DDP without codec and other axes."""
    codec: str = "Identity()"
    """What gradients go through, e.g. ``"TopK(0.01) >> Int8()"``."""
    momentum_correction: bool = False
    """Apply SGD's momentum before the codec instead of after it; for sparse codecs."""
    momentum_masking: bool = False
    """With momentum correction: an entry that is sent loses its velocity, as in the paper."""
    local_clip: float | None = None
    """Clip each rank's gradient of each parameter before the codec sees it, as if at this norm after averaging."""
    warm_up_steps: int = 0
    """Updates in which a sparse codec sends more than its ratio, falling to it."""
    algorithm: Literal["auto", "gather", "two_phase"] = "auto"
    """How payloads travel; ``auto`` takes what sends fewer bytes."""
    node_size: int = 1
    """Ranks of a node: gradients are summed in fp32 inside, and go through the codec between nodes."""
    backend: Literal["torch", "horovod"] = "torch"
    """What moves the bytes, and with it the launcher: torchrun or horovodrun."""
    timeout_s: float = 120.0
    """A collective that takes longer ends the job."""
    bucket_mb: float | None = None
    """MiB of gradients that share an exchange; left out: 25."""
    whole_buckets: bool = False
    """Let a sparse codec choose among all parameters of a bucket, wherever the entries are largest."""

    def __post_init__(self) -> None:
        if not 0 < self.timeout_s <= 1e6:
            raise ValueError(f"timeout_s is {self.timeout_s}, expected more than 0 and at most 1e6")
        self.plan()

    def plan(self) -> Plan:
        """The plan, valid or refused."""
        return Plan(
            data=self.data,
            tensor=self.tensor,
            pipeline=self.pipeline,
            shard=self.shard,
            shard_size=self.shard_size,
            schedule=self.schedule,
            microbatches=self.microbatches,
            sequence=self.sequence,
            tensor_styles=self.tensor_styles,
            checkpointing=self.checkpointing,
            compile=self.compile,
            exchange=self.exchange,
            codec=parse_codec(self.codec),
            sync=SyncConfig(
                masking=self.momentum_masking,
                local_clip=self.local_clip,
                warm_up_steps=self.warm_up_steps,
                bucket_mb=self.bucket_mb,
                whole_buckets=self.whole_buckets,
                node_size=self.node_size,
                algorithm=self.algorithm,
            ),
            momentum_correction=self.momentum_correction,
            backend=self.backend,
        )


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """Learn from a teacher too."""

    teacher: str
    """Folder written by ``save_pretrained``."""
    temperature: float = 2.0
    weight: float = 0.5

    def __post_init__(self) -> None:
        check_distillation(self.temperature, self.weight)


@dataclass(frozen=True, kw_only=True)
class ClusterRecipe:
    """One training run on a cluster, or on one process."""

    name: str
    seed: int = 0
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    step: StepConfig = field(default_factory=StepConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    distillation: DistillationConfig | None = None
    tensorboard: bool = False
    """Also write tensorboard files (extra ``tensorboard``)."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 1 << 32:
            raise ValueError(f"seed is {self.seed}, expected 0 or more and less than 2**32")


def train(
    recipe: ClusterRecipe,
    *,
    out: Path,
    resume: bool = False,
    on_step: OnStep | None = None,
) -> dict[str, Any] | None:
    """Run a recipe on the processes that were started.

    Args:
        recipe: What to do.
        out: Where run folders are. Rank 0 makes ``out/<name>``, or ``out/<name>-2`` if that is taken.
        resume: Go on with the newest run of this name instead.
        on_step: Called on rank 0 after each update with updates done, updates in all, and the result.

    Returns:
        What ``result.json`` holds, on rank 0; ``None`` on the others.

    Raises:
        EfftrainError: Anything wrong with recipe, data, checkpoint or numbers; see ``training.fit``.
    """
    prepared = _prepare(recipe, mesh.launched_size())
    with mesh.process_group(timeout_s=recipe.parallel.timeout_s, backend=recipe.parallel.backend) as device:
        return _train(recipe, prepared, device, out, resume, on_step)


@dataclass(frozen=True, eq=False)
class _Prepared:
    """What a run is made of, checked before the ranks meet."""

    plan: Plan
    layout: Layout
    model: nn.Module
    train_data: Dataset
    test_data: Dataset
    num_outputs: int


def _prepare(recipe: ClusterRecipe, world_size: int) -> _Prepared:
    plan = recipe.parallel.plan()
    plan.check(world_size)
    if recipe.tensorboard:
        check_tensorboard()
    if recipe.distillation is not None and (plan.tensor > 1 or plan.pipeline > 1):
        raise ConfigError("a teacher needs the inputs and outputs of whole models; set parallel.tensor=pipeline=1")
    num_replicas = plan.replicas(world_size)
    recipe.loop.check_pieces(num_replicas, recipe.step.micro_batches * plan.num_micro_batches)
    set_seed(recipe.seed, 0, deterministic=recipe.loop.deterministic)  # equal weights on all ranks
    model = build_model(recipe.model.name, **recipe.model.options)
    if recipe.model.pretrained is not None:
        try:
            model.load_state_dict(load_pretrained(Path(recipe.model.pretrained)).state_dict())
        except RuntimeError as error:
            raise CheckpointError(
                f"{recipe.model.pretrained} does not fit model {recipe.model.name!r}: {error}"
            ) from error
    train_data, test_data = (
        load_dataset(recipe.data.name, split, **recipe.data.options) for split in ("train", "test")
    )
    recipe.loop.steps_per_epoch(len(train_data))
    num_outputs = check_fit(f"model {recipe.model.name!r}", model, recipe.data.name, train_data)
    example = torch.from_numpy(train_data.batch(np.arange(recipe.loop.batch_size))[0])
    layout = plan.check(world_size, model, example, recipe.step)
    return _Prepared(plan, layout, model, train_data, test_data, num_outputs)


def _train(
    recipe: ClusterRecipe,
    prepared: _Prepared,
    device: torch.device,
    out: Path,
    resume: bool,
    on_step: OnStep | None,
) -> dict[str, Any] | None:
    if mesh.world_size() > 1:
        check_agreement(mesh.transport(device), facts_of(to_dict(recipe)))
    plan, model, train_data = prepared.plan, prepared.model, prepared.train_data
    total_steps = recipe.loop.epochs * recipe.loop.steps_per_epoch(len(train_data))
    num_parameters = sum(p.numel() for p in model.parameters())
    objective = _objective(recipe, device)
    if isinstance(objective, Distillation) and recipe.distillation is not None:
        teacher = f"teacher {recipe.distillation.teacher!r}"
        found = check_fit(teacher, objective.teacher, recipe.data.name, train_data)
        if found != prepared.num_outputs:
            raise ConfigError(f"{teacher} has {found} outputs, expected those of the model, {prepared.num_outputs}")
    job = plan.apply(
        model.to(device),
        objective=objective,
        optimizer=recipe.optimizer,
        step=recipe.step,
        seed=recipe.seed,
        layout=prepared.layout,
    )
    # Ranks that divide the layers of one replica drop out the same units.
    set_seed(recipe.seed, job.exchange.replica, deterministic=recipe.loop.deterministic)
    begun = _find_run(recipe, out, resume) if mesh.rank() == 0 else (0, False)
    number, goes_on = (int(value) for value in job.exchange.sum(begun))  # what rank 0 found
    path = run_path(out, recipe.name, number)
    run = RunFolder(path, tensorboard=recipe.tensorboard) if mesh.rank() == 0 else None
    report = (lambda done, result: on_step(done, total_steps, result)) if run is not None and on_step else None
    try:
        if run is not None:
            run.write_recipe(recipe)
        result = fit(
            job,
            train_data,
            prepared.test_data,
            recipe.loop,
            seed=recipe.seed,
            run=run,
            checkpoints=path / "checkpoints",
            resume=bool(goes_on),
            on_step=report,
        )
        if not isinstance(model, Pretrained):
            job.export(path / "model" / "model.safetensors")
        if run is None:
            return None
        if isinstance(model, Pretrained):
            _whole(recipe, model, job, path).save_pretrained(path / "model")
        return run.finish(
            {
                "kind": "cluster",
                "name": recipe.name,
                "path": str(path),
                "seed": recipe.seed,
                "world_size": mesh.world_size(),
                "axes": {
                    "data": plan.replicas(mesh.world_size()),
                    "tensor": plan.tensor,
                    "pipeline": plan.pipeline,
                    "shard": plan.shard,
                },
                "codec": format_codec(plan.codec),
                "accuracy": result.evaluation.accuracy,
                "loss": result.evaluation.loss,
                "first_step": result.first_step,
                "num_steps": result.num_steps,
                "num_skipped": result.num_skipped,
                "train_s": result.train_s,
                "num_parameters": num_parameters,
                **result.totals,
            }
        )
    finally:
        if run is not None:
            run.close()


def _whole(recipe: ClusterRecipe, model: Pretrained, job: Job, path: Path) -> Pretrained:
    """The trained model in one piece; what a plan has divided is put together from the last checkpoint."""
    if not job.exchange.is_divided:
        return model
    whole = build_model(recipe.model.name, **recipe.model.options)
    assert isinstance(whole, Pretrained), "built as the model was"
    load_model(complete_checkpoints(path / "checkpoints")[-1], whole)
    return whole


def _find_run(recipe: ClusterRecipe, out: Path, resume: bool) -> tuple[int, bool]:
    """The run folder, and whether to go on with what is in it: always if this launch began it (see ``launched``)."""
    launch = mesh.launch_id()
    begun = launched.find_run(out, recipe.name, launch)
    if begun is not None:
        return begun, True
    number = _run_number(recipe, out, resume)
    launched.mark_run(out, recipe.name, number, launch)
    return number, resume


def _run_number(recipe: ClusterRecipe, out: Path, resume: bool) -> int:
    """Claim a new run folder, or find the one to resume."""
    if not resume:
        return claim_run(out, recipe.name)
    number = next_run_number(out, recipe.name) - 1
    if number < 1:
        raise ConfigError(f"no run called {recipe.name!r} in {out} to resume; leave out --resume")
    path = run_path(out, recipe.name, number) / "recipe.toml"
    if path.exists():  # else it was killed before its first step
        before, now = (_kept_keys(one) for one in (load_recipe(ClusterRecipe, path), recipe))
        for key in {**before, **now}:
            if before.get(key) != now.get(key):
                raise ConfigError(
                    f"{path.parent} was started with {key} = {before.get(key, NOTHING)}, expected the same, found "
                    f"{now.get(key, NOTHING)}; resume it with its own recipe or start a new run without --resume"
                )
    return number


def _kept_keys(recipe: ClusterRecipe) -> dict[str, str]:
    """What a run keeps for good, key by key."""
    found = plain(to_dict(recipe))
    kept = ("seed", "optimizer.name", "loop.batch_size")
    return {key: value for key, value in found.items() if key in kept or key.startswith(("model.", "data."))}


def _objective(recipe: ClusterRecipe, device: Any) -> Objective:
    config = recipe.distillation
    if config is None:
        return cross_entropy
    teacher = load_pretrained(Path(config.teacher)).to(device)
    return Distillation(teacher, config.temperature, config.weight)

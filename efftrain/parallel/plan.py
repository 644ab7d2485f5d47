"""The plan: how one training run is spread over processes. Valid by construction, or refused with the remedy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any, Literal, get_type_hints

import torch
from torch import Tensor, nn

from efftrain.compression import Codec, Identity, LowRank
from efftrain.config import check_value
from efftrain.errors import ConfigError
from efftrain.parallel import mesh
from efftrain.parallel.agreement import check_agreement, facts_of_job
from efftrain.parallel.axes import Axes
from efftrain.parallel.backends import Transport
from efftrain.parallel.batch_norm import refuse_waiting, warn_of_pieces
from efftrain.parallel.collectives import refuse_deflate
from efftrain.parallel.data import DataParallel
from efftrain.parallel.divided import divided
from efftrain.parallel.layout import Layout
from efftrain.parallel.pipeline import (
    SPLIT_BACKWARD,
    Schedule,
    check_micro_batches,
    holders,
    stages_a_rank,
)
from efftrain.parallel.recompute import Checkpointing, blocks, check_blocks, compile_blocks, recompute
from efftrain.parallel.sharded import check_shards
from efftrain.parallel.stages import StageCut, cut_model, shared_parameters
from efftrain.parallel.sync import GradSync, SyncConfig
from efftrain.parallel.tensor import plan_tensor
from efftrain.training import Exchange, Job, Objective, OptimizerConfig, SingleProcess, StepConfig, cross_entropy
from efftrain.training.float8 import check_float8, to_float8
from efftrain.training.job import first_names

_OBJECTS = ("codec", "sync", "tensor_styles")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a run is spread over processes: ``data x tensor x pipeline`` of them.

    Args:
        data: Replicas that share each batch; ``None`` takes all processes that the other axes leave.
        tensor: Ranks that divide the layers of a replica (see ``plan_tensor``). They talk in every layer: neighbors on
            a fast link.
        pipeline: Ranks that hold consecutive layers each (see ``cut_model``). They send activations only.
        shard: Divide weights and gradients over the data axis: ``grads`` keeps whole weights between steps' forward
            and backward passes, ``full`` gathers each layer when it is needed.
        shard_size: Ranks that share one copy of the weights, a divisor of ``data``; ``None`` is all of them.
        schedule: In which order a pipeline works. ``zbv`` and ``dualpipev`` idle least and hold most activations.
        microbatches: Pieces of a replica's batch that are in a pipeline at the same time; ``None`` is two for each of
            its ranks. More idle less and compute in smaller pieces.
        sequence: Divide positions over the tensor axis where layers are not divided: less memory.
        tensor_styles: Module name -> style (``columns``, ``rows``, ``entries``, ``classes``, ``whole``), where the
            tensor axis is to divide in another way than it finds.
        checkpointing: Recompute activations in the backward pass (see ``recompute``): ``selective`` or ``full``.
        compile: Compile blocks with ``torch.compile``: the first step takes long, the others less.
        exchange: What averages gradients of undivided weights: torch's ``ddp``, our ``gradsync``, or ``auto``: DDP on a
            data axis alone without a codec.
        codec: What gradients go through on the data axis. ``Identity`` is the plain all-reduce.
        sync: How they are exchanged if there is a codec: buckets, nodes, warm-up, local clipping.
        momentum_correction: Move the momentum of SGD in front of the codec (see ``compression.Feedback``); what sparse
            codecs need to train as the uncompressed run does. Without effect on ``Identity`` and on one process.
        backend: What moves the bytes: ``torch`` (torch.distributed, gloo or NCCL) or ``horovod``.

    Raises:
        ConfigError: Settings that do not go together.
    """

    data: int | None = None
    tensor: int = 1
    pipeline: int = 1
    shard: Literal["none", "grads", "full"] = "none"
    shard_size: int | None = None
    schedule: Schedule = "1f1b"
    microbatches: int | None = None
    sequence: bool = False
    tensor_styles: Mapping[str, str] = field(default_factory=dict)
    checkpointing: Checkpointing = "none"
    compile: bool = False
    exchange: Literal["auto", "ddp", "gradsync"] = "auto"
    codec: Codec = field(default_factory=Identity)
    sync: SyncConfig = field(default_factory=SyncConfig)
    momentum_correction: bool = False
    backend: Literal["torch", "horovod"] = "torch"

    def __post_init__(self) -> None:
        self._check_types()
        for name in ("data", "tensor", "pipeline", "shard_size"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ConfigError(f"plan.{name} is {size}, expected at least 1")
        if self.sync.masking and not self.momentum_correction:
            raise ConfigError("momentum factor masking is part of momentum correction; set momentum_correction too")
        if self.sync.momentum:
            raise ConfigError("sync.momentum is the optimizer's, set by momentum_correction; leave it 0 in a plan")
        self._check_pipeline()
        self._check_data_axis()
        if self.tensor == 1 and (self.sequence or self.tensor_styles):
            raise ConfigError("sequence and tensor_styles are about the tensor axis, which has one rank; set tensor")

    @property
    def num_stages(self) -> int:
        """Stages of the pipeline."""
        return self.pipeline * stages_a_rank(self.schedule) if self.pipeline > 1 else 1

    @property
    def num_micro_batches(self) -> int:
        """Pieces of a replica's batch in the pipeline; 1 without one."""
        if self.pipeline == 1:
            return 1
        return 2 * self.pipeline if self.microbatches is None else self.microbatches

    @property
    def is_divided(self) -> bool:
        """Whether a rank holds less than the whole model."""
        return self.tensor > 1 or self.pipeline > 1 or self.shard != "none"

    def replicas(self, world_size: int) -> int:
        """Size of the data axis.

        Raises:
            ConfigError: The axes do not make up so many processes.
        """
        rest = self.tensor * self.pipeline
        if self.data is None and world_size % rest == 0:
            return world_size // rest
        wanted = (self.data or 1) * rest
        if self.data is None or wanted != world_size:
            launcher = "torchrun --nproc-per-node" if self.backend == "torch" else "horovodrun --gloo -np"
            axes = f"{'any' if self.data is None else self.data} data x {self.tensor} tensor x {self.pipeline} pipeline"
            remedy = f"set parallel.data={world_size // rest}" if world_size % rest == 0 else "change an axis"
            if rest == 1:
                raise ConfigError(
                    f"the plan wants {self.data} data-parallel processes, {world_size} were started; "
                    f"start with {launcher} {self.data} or {remedy}"
                )
            raise ConfigError(
                f"the plan wants {axes} processes, a multiple of {wanted}, {world_size} were started; start with "
                f"{launcher} {wanted} or {remedy}"
            )
        return self.data

    def check(
        self,
        world_size: int,
        model: nn.Module | None = None,
        example: Tensor | None = None,
        step: StepConfig | None = None,
    ) -> Layout:
        """Refuse a plan that does not fit the processes, or the model. Needs no process group.

        Args:
            world_size: Processes of the run.
            model: The whole model; without it only numbers are checked.
            example: Inputs of a batch, as ``apply`` takes them.
            step: How one update is computed.

        Returns:
            How it divides the model; ``apply`` takes it.

        Raises:
            ConfigError: With the remedy.
        """
        if model is None:
            self._check_processes(world_size)
            return Layout()
        if self.checkpointing != "none":
            check_blocks(model, self.checkpointing)
        if self.pipeline > 1:
            refuse_waiting(model)
        step = step or StepConfig()
        self._check_step(model, step)
        share = self._share(world_size, example, step)
        layout = self.lay_out(model, share, bf16=step.precision == "bf16")
        if self.shard != "none" and world_size > 1:
            check_shards([cut.build(model) for cut in layout.cuts] or [model])
        return layout

    def _check_step(self, model: nn.Module, step: StepConfig) -> None:
        if self.pipeline > 1 and step.micro_batches > 1:
            raise ConfigError(
                f"step.micro_batches is {step.micro_batches}: a pipeline cuts its batch already; set "
                f"parallel.microbatches={step.micro_batches} and leave step.micro_batches out"
            )
        if step.precision == "float8" and not self.tensor == self.pipeline == 1:
            raise ConfigError(
                "step.precision=float8 changes whole linear layers, which a tensor or pipeline axis takes apart; set "
                "step.precision=bf16, or parallel.tensor=1 and parallel.pipeline=1"
            )
        if step.precision == "float8":
            check_float8(model)

    def lay_out(self, model: nn.Module, share: Tensor, *, bf16: bool = False) -> Layout:
        """Find out how the tensor and pipeline axis divide a model.

        Args:
            model: The whole model; not changed.
            share: Inputs of one replica, a multiple of the micro-batches; not looked at without such an axis.
            bf16: It runs under autocast.

        Raises:
            ConfigError: They cannot; see ``plan_tensor`` and ``cut_model``.
        """
        tensor, cuts = None, []
        if self.tensor > 1:
            tensor = plan_tensor(model, share, self.tensor, self.tensor_styles, sequence=self.sequence)
        if self.pipeline > 1:
            micro_batch = share[: len(share) // self.num_micro_batches]
            together = () if tensor is None else tensor.together
            closed = self._closed_blocks(model)
            cuts = cut_model(model, micro_batch, self.num_stages, together=together, closed=closed, bf16=bf16)
            self._check_shared(model, cuts)
        return Layout(tensor, tuple(cuts))

    def _closed_blocks(self, model: nn.Module) -> list[str]:
        """Names of what a stage has as a whole or not at all."""
        if self.checkpointing == "none" and not self.compile:
            return []
        found = blocks(model)
        if not found:
            raise ConfigError(
                f"{type(model).__name__} has no ModuleList of blocks, which parallel.compile works on in a pipeline; "
                "put its layers into one or set parallel.compile=false"
            )
        return found

    def _check_shared(self, model: nn.Module, cuts: Sequence[StageCut]) -> None:
        for name, stages in shared_parameters(model, cuts).items():
            remedy = None
            if self.tensor > 1 or self.shard != "none":
                remedy = "a plan that divides it cannot hold it there: set parallel.tensor=1 and parallel.shard=none"
            elif len(holders(stages, self.pipeline, self.schedule)) > 1 and self.codec.combine != "sum":
                remedy = (
                    f"on ranks that would each owe a part of it under {self.codec}: take schedule=zbv, which has the "
                    "first and the last stage on one rank, or no codec"
                )
            if remedy is not None:
                numbers = " and ".join(map(str, stages))
                raise ConfigError(
                    f"parameter {name!r} is used in pipeline stages {numbers}; {remedy}, or untie it "
                    "(char-transformer: tied = false)"
                )

    def _check_processes(self, world_size: int) -> None:
        replicas = self.replicas(world_size)
        if self.shard_size is not None and replicas % self.shard_size:
            raise ConfigError(
                f"parallel.shard_size is {self.shard_size}, expected a divisor of the data axis, {replicas} ranks"
            )
        node = self.sync.node_size
        if node > 1 and self.is_divided and (node % self.tensor or replicas * self.tensor % node):
            raise ConfigError(
                f"nodes of {node} ranks cannot hold whole tensor axes of {self.tensor} and divide the "
                f"{replicas * self.tensor} ranks of a stage; choose a node_size that does, or leave it out"
            )

    def _share(self, world_size: int, example: Tensor | None, step: StepConfig) -> Tensor:
        """What one replica gets of the example."""
        self._check_processes(world_size)
        if self.tensor == self.pipeline == 1:
            return torch.empty(0)
        if example is None:
            raise ConfigError("a plan with a tensor or pipeline axis needs an example: plan.apply(model, inputs)")
        pieces = self.replicas(world_size) * self.num_micro_batches
        if not len(example) or len(example) % pieces:
            raise ConfigError(
                f"the example is a batch of {len(example)}, expected a multiple of {pieces}: "
                f"{self.replicas(world_size)} replicas x {self.num_micro_batches} micro-batches of the pipeline; "
                "change the batch or parallel.microbatches"
            )
        return example[: len(example) // self.replicas(world_size)]

    def apply(
        self,
        model: nn.Module,
        example: Tensor | None = None,
        *,
        objective: Objective = cross_entropy,
        optimizer: OptimizerConfig | None = None,
        step: StepConfig | None = None,
        total_steps: int | None = None,
        seed: int = 0,
        layout: Layout | None = None,
    ) -> Job:
        """Turn a plain model into a job of this rank.

        Args:
            model: On its device, equal on all ranks. A plan that divides it takes its parts over.
            example: Inputs of a batch of all processes together, of the size that the steps will have; only a tensor or
                pipeline axis needs them.
            objective: Gives the mean loss of a batch. With a pipeline the inputs are elsewhere: it gets none, and
                ``model(...)`` gives the output.
            optimizer: Optimizer and schedule.
            step: How one update is computed.
            total_steps: Length of the schedule in updates; without it the learning rate stays at its peak.
            seed: Of stochastic rounding in the codec.
            layout: What ``check`` found for this model and example; found now if left out.

        Raises:
            ConfigError: The plan does not fit the processes started, or the model; or another rank was given something
                else.
        """
        step = step or StepConfig()
        world_size = mesh.world_size()
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ConfigError(f"model {type(model).__name__} has no trainable parameter; there is nothing to train")
        device = next(model.parameters()).device
        mesh.check_device(device)
        self._check_step(model, step)
        if layout is None:
            layout = self.check(world_size, model, None if example is None else example.to(device), step)
        optimizer = optimizer or OptimizerConfig()
        if world_size > 1:
            facts = facts_of_job(
                self,
                layout,
                objective=getattr(objective, "__qualname__", type(objective).__qualname__),
                optimizer=optimizer,
                step=step,
                total_steps=total_steps,
                seed=seed,
            )
            check_agreement(mesh.transport(device), facts, "the same plan, the same settings and the same efftrain")
        if mesh.rank() == 0:
            warn_of_pieces(model, self.replicas(world_size), self.num_micro_batches * step.micro_batches)
        momentum = optimizer.momentum if self._corrects(optimizer) else 0.0
        if step.precision == "float8":
            to_float8(model)
        if self.is_divided and world_size > 1:
            return self._divided_job(model, layout, objective, optimizer, step, total_steps, momentum, seed)
        recompute(model, self.checkpointing)
        if self.compile:
            compile_blocks(model)
        exchange: Exchange = SingleProcess()
        if world_size > 1:
            optimizer = replace(optimizer, momentum=0.0) if momentum else optimizer
            exchange = self._exchange(mesh.transport(device), momentum, seed)
        return Job(
            model, objective=objective, optimizer=optimizer, step=step, total_steps=total_steps, exchange=exchange
        )

    def _divided_job(
        self,
        model: nn.Module,
        layout: Layout,
        objective: Objective,
        optimizer: OptimizerConfig,
        step: StepConfig,
        total_steps: int | None,
        momentum: float,
        seed: int,
    ) -> Job:
        device, names = next(model.parameters()).device, first_names(model)
        data = self.replicas(mesh.world_size())
        axes = Axes.make(
            device,
            pipeline=self.pipeline,
            data=data,
            tensor=self.tensor,
            shard=1 if self.shard == "none" else self.shard_size or data,
        )
        momentum = momentum if data > 1 else 0.0
        part, exchange, compute = divided(
            self,
            model,
            layout,
            axes,
            objective=objective,
            step=step,
            sync=replace(self.sync, momentum=momentum, seed=seed),
        )
        optimizer = replace(optimizer, momentum=0.0) if momentum else optimizer
        return Job(
            part,
            optimizer=optimizer,
            step=step,
            total_steps=total_steps,
            exchange=exchange,
            compute=compute,
            names=names,
        )

    def _exchange(self, transport: Transport, momentum: float, seed: int) -> Exchange:
        plain = isinstance(self.codec, Identity) and self.backend == "torch"
        if self.exchange == "ddp" or (self.exchange == "auto" and plain):
            return DataParallel(transport, bucket_mb=self.sync.bucket_mb)
        sync = replace(self.sync, momentum=momentum, seed=seed)
        return GradSync(self.codec, transport, sync)

    def _corrects(self, optimizer: OptimizerConfig) -> bool:
        if self.momentum_correction and optimizer.name != "sgd":
            raise ConfigError(
                f"momentum_correction is for SGD with momentum, the optimizer is {optimizer.name}; "
                'set optimizer.name="sgd" or parallel.momentum_correction=false'
            )
        return self.momentum_correction and self.codec.combine != "sum"

    def _check_types(self) -> None:
        """In code nobody else does; a word that is no setting would act as some other one."""
        for name, hint in _plain_fields().items():
            check_value(hint, getattr(self, name), f"plan.{name}")
        if not isinstance(self.codec, Codec):
            raise ConfigError(
                f"plan.codec is {self.codec!r}, expected a codec such as Int8() of efftrain.compression; a text "
                "becomes one by parse_codec"
            )
        if not isinstance(self.sync, SyncConfig):
            raise ConfigError(f"plan.sync is {self.sync!r}, expected a SyncConfig")
        if not isinstance(self.tensor_styles, Mapping):
            raise ConfigError(f"plan.tensor_styles is {self.tensor_styles!r}, expected names of modules and styles")

    def _check_pipeline(self) -> None:
        if self.pipeline == 1:
            if self.microbatches is not None:
                raise ConfigError(
                    "plan.microbatches is about the pipeline axis, which has one rank; for gradient accumulation set "
                    "step.micro_batches"
                )
            return
        check_micro_batches(self.schedule, self.pipeline, self.num_micro_batches)
        if self.compile and self.schedule in SPLIT_BACKWARD:
            raise ConfigError(
                f"schedule {self.schedule} splits the backward pass, which compiled code does in one; take "
                "schedule=interleaved_1f1b, or compile=false"
            )
        if self.checkpointing != "none" and self.schedule in SPLIT_BACKWARD:
            raise ConfigError(
                f"schedule {self.schedule} goes through a graph twice, which recomputed activations have only once; "
                "take schedule=interleaved_1f1b, or checkpointing=none"
            )
        if self.shard == "full" and self.schedule in SPLIT_BACKWARD:
            raise ConfigError(
                f"schedule {self.schedule} goes back to the gathered weights of the forward pass, and shard=full gives "
                "those away: they would be left without gradients. Take shard=grads, or schedule=interleaved_1f1b"
            )

    def _check_data_axis(self) -> None:
        refuse_deflate(self.codec)
        plain = isinstance(self.codec, Identity)
        if self.backend == "horovod" and self.is_divided:
            raise ConfigError(
                "Horovod has the data axis only; set parallel.backend=torch, or tensor, pipeline and shard off"
            )
        if self.exchange == "ddp":
            if not plain or self.backend == "horovod":
                raise ConfigError("DDP carries no codec and no Horovod here; take exchange=gradsync or auto")
            if self.is_divided:
                where = f"schedule {self.schedule}" if self.pipeline > 1 else "a model whose layers are divided"
                raise ConfigError(
                    f"DDP's hooks do not see all gradients of {where}; take exchange=gradsync, the same all-reduce, "
                    "or auto"
                )
        if self.shard == "none":
            if self.shard_size is not None:
                raise ConfigError("plan.shard_size is about a sharded data axis; set shard=full or shard=grads too")
        elif self.exchange == "gradsync":
            raise ConfigError("sharded weights are exchanged by fully_shard; take exchange=auto, or shard=none")
        elif not plain and (isinstance(self.codec, LowRank) or self.codec.combine == "sum"):
            raise ConfigError(f"{self.codec} cannot encode the shards of a module; take TopK, Int8 or shard=none")
        elif self.momentum_correction or self.sync != SyncConfig(bucket_mb=self.sync.bucket_mb):
            raise ConfigError(
                "momentum correction, warm-up, local clipping, nodes and algorithms belong to gradsync; leave them out "
                "or set shard=none"
            )


@cache
def _plain_fields() -> dict[str, Any]:
    """Type hints of what a recipe could hold."""
    hints = get_type_hints(Plan)
    return {field.name: hints[field.name] for field in fields(Plan) if field.name not in _OBJECTS}

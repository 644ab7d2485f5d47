"""The plan: how one training run is spread over processes. Valid by construction, or refused with the remedy."""

from dataclasses import dataclass, field, replace
from typing import Literal

from torch import nn

from efftrain.compression import Codec, Identity
from efftrain.errors import ConfigError
from efftrain.parallel import mesh
from efftrain.parallel.backends import Transport
from efftrain.parallel.data import DataParallel
from efftrain.parallel.sync import GradSync, SyncConfig
from efftrain.training import Exchange, Job, Objective, OptimizerConfig, SingleProcess, StepConfig, cross_entropy


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a run is spread over processes.

    Args:
        data: Replicas that share each batch; ``None`` takes all processes.
        codec: What gradients go through on the data axis. ``Identity`` is the plain all-reduce.
        sync: How they are exchanged if there is a codec: buckets, nodes, warm-up, local clipping.
        momentum_correction: Move the momentum of SGD in front of the codec (see ``compression.Feedback``); what sparse
            codecs need to train as the uncompressed run does. Without effect on ``Identity`` and on one process.
        backend: What moves the bytes: ``torch`` (torch.distributed, gloo or NCCL) or ``horovod``.

    The tensor, pipeline and shard axes join this class; a plan of today stays valid then.
    """

    data: int | None = None
    codec: Codec = field(default_factory=Identity)
    sync: SyncConfig = field(default_factory=SyncConfig)
    momentum_correction: bool = False
    backend: Literal["torch", "horovod"] = "torch"

    def __post_init__(self) -> None:
        if self.data is not None and self.data < 1:
            raise ConfigError(f"plan.data is {self.data}, expected at least 1")
        if self.sync.masking and not self.momentum_correction:
            raise ConfigError("momentum factor masking is part of momentum correction; set momentum_correction too")
        if self.sync.momentum:
            raise ConfigError("sync.momentum is the optimizer's, set by momentum_correction; leave it 0 in a plan")

    def check(self, world_size: int) -> None:
        """Refuse a plan that does not fit the number of processes.

        Raises:
            ConfigError: With the remedy.
        """
        if self.data is not None and self.data != world_size:
            launcher = "torchrun --nproc-per-node" if self.backend == "torch" else "horovodrun --gloo -np"
            raise ConfigError(
                f"the plan wants {self.data} data-parallel processes, {world_size} were started; "
                f"start with {launcher} {self.data} or set parallel.data={world_size}"
            )

    def apply(
        self,
        model: nn.Module,
        *,
        objective: Objective = cross_entropy,
        optimizer: OptimizerConfig | None = None,
        step: StepConfig | None = None,
        total_steps: int | None = None,
        seed: int = 0,
    ) -> Job:
        """Turn a plain model into a job of this rank.

        Args:
            model: On its device, equal on all ranks (DDP broadcasts rank 0's weights).
            objective: Gives the mean loss of a batch.
            optimizer: Optimizer and schedule.
            step: How one update is computed.
            total_steps: Length of the schedule in updates; without it the learning rate stays at its peak.
            seed: Of stochastic rounding in the codec.

        Raises:
            ConfigError: The plan does not fit the processes started.
        """
        self.check(mesh.world_size())
        optimizer = optimizer or OptimizerConfig()
        momentum = optimizer.momentum if self._corrects(optimizer) else 0.0
        exchange: Exchange = SingleProcess()
        if mesh.world_size() > 1:
            exchange = self._exchange(mesh.transport(next(model.parameters()).device), momentum, seed)
            optimizer = replace(optimizer, momentum=0.0) if momentum else optimizer
        return Job(
            model, objective=objective, optimizer=optimizer, step=step, total_steps=total_steps, exchange=exchange
        )

    def _exchange(self, transport: Transport, momentum: float, seed: int) -> Exchange:
        if isinstance(self.codec, Identity) and self.backend == "torch":
            return DataParallel(transport, bucket_mb=self.sync.bucket_mb)
        return GradSync(self.codec, transport, replace(self.sync, momentum=momentum, seed=seed))

    def _corrects(self, optimizer: OptimizerConfig) -> bool:
        if self.momentum_correction and optimizer.name != "sgd":
            raise ConfigError(
                f"momentum_correction is for SGD with momentum, the optimizer is {optimizer.name}; "
                'set optimizer.name="sgd" or parallel.momentum_correction=false'
            )
        return self.momentum_correction and self.codec.combine != "sum"

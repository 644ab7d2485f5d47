"""A job: a model, its optimizer, and all that one update needs. The plan decides who takes part in it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from efftrain.errors import CheckpointError, ConfigError, NonFiniteError
from efftrain.training.compute import Compute, Precision, WholeModel
from efftrain.training.exchange import Exchange, SingleProcess
from efftrain.training.objective import Objective, cross_entropy
from efftrain.training.optimizer import OptimizerConfig

MAX_SKIPPED_IN_A_ROW = 20
"""So many steps with inf or NaN one after the other end the run: nothing is learned any more."""


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """How one update is computed."""

    micro_batches: int = 1
    """The batch of a rank is cut into so many pieces; gradients are accumulated. Less memory, and the same result
    but for batch norm, which sees one piece at a time."""
    clip_norm: float | None = None
    """Largest Euclidean norm of the averaged gradient; larger ones are scaled down to it."""
    precision: Precision = "fp32"
    """``bf16`` runs the forward pass under autocast; weights and gradients stay fp32. ``float8`` also computes the
    matrix products of linear layers in 8-bit floats, see ``training.float8``."""
    check_replicas_every: int = 100
    """Updates between two looks whether all ranks still hold the same weights. 0: never."""

    def __post_init__(self) -> None:
        if self.micro_batches < 1:
            raise ValueError(f"micro_batches is {self.micro_batches}, expected at least 1")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm is {self.clip_norm}, expected more than 0")
        if self.check_replicas_every < 0:
            raise ValueError(f"check_replicas_every is {self.check_replicas_every}, expected 0 or more")


def first_names(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter or buffer -> the first name of the same tensor: layers may share a weight.

    Found before a plan divides the model: a rank that holds one of the layers knows the name as well.
    """
    first: dict[int, str] = {}
    return {name: first.setdefault(id(value), name) for name, value in model.state_dict(keep_vars=True).items()}


@dataclass(frozen=True)
class StepResult:
    """What one update did."""

    loss: float
    """Mean over all ranks, in the objective's unit; NaN if the step was skipped."""
    grad_norm: float
    """Euclidean norm of the averaged gradient before clipping."""
    lr: float
    skipped: bool
    """Some rank saw inf or NaN, so no rank changed anything."""


class Job:
    """Training state of one rank.

    Args:
        model: On its device; or, with ``compute``, what this rank holds of it. The exchange may wrap it; ``job.model``
            stays the one given.
        objective: Gives the mean loss of a batch.
        optimizer: Optimizer and schedule.
        step: How one update is computed.
        total_steps: Length of the schedule in updates; while it is unknown the learning rate stays at its peak. ``fit``
            sets it.
        exchange: The other ranks.
        compute: Forward and backward passes; ``WholeModel`` if left out. One that was made with its exchange.
        names: ``first_names`` of the whole model, if this is a part of it.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        objective: Objective = cross_entropy,
        optimizer: OptimizerConfig | None = None,
        step: StepConfig | None = None,
        total_steps: int | None = None,
        exchange: Exchange | None = None,
        compute: Compute | None = None,
        names: Mapping[str, str] | None = None,
    ) -> None:
        self.model = model
        self._first_name = names or first_names(model)
        self.optimizer_config = optimizer or OptimizerConfig()
        self.step_config = step or StepConfig()
        self.total_steps = total_steps
        self.exchange = exchange or SingleProcess()
        self.exchange.is_entrywise = self.optimizer_config.is_entrywise and self.step_config.clip_norm is None
        self.optimizer = self.optimizer_config.build(model)
        self.num_steps = 0
        self.num_skipped = 0
        self.compute = compute or WholeModel(
            model,
            self.exchange,
            objective,
            micro_batches=self.step_config.micro_batches,
            precision=self.step_config.precision,
        )
        self.device = next(model.parameters()).device
        self._skipped_in_a_row = 0

    def share(self, *batch: Tensor) -> tuple[Tensor, ...]:
        """This replica's part of a batch that all ranks have.

        Args:
            batch: Tensors of one length, a multiple of ``exchange.num_replicas``.

        Raises:
            ConfigError: It cannot be cut evenly.
        """
        parts = self.exchange.num_replicas
        if any(len(tensor) % parts for tensor in batch):
            raise ConfigError(f"a batch of {len(batch[0])} cannot be shared by {parts} replicas; take a multiple")
        return tuple(tensor.chunk(parts)[self.exchange.replica] for tensor in batch)

    def save(self, folder: Path) -> Path:
        """Write a checkpoint below ``folder``; every rank calls it. See ``training.checkpoint``."""
        from efftrain.training.checkpoint import save_checkpoint

        return save_checkpoint(folder, self)

    def load(self, folder: Path, *, seed: int = 0) -> bool:
        """Go on with the newest checkpoint below ``folder``, of any plan. Every rank calls it.

        Returns:
            Whether there was one.
        """
        from efftrain.training.checkpoint import load_checkpoint

        return load_checkpoint(folder, self, seed=seed) is not None

    def export(self, path: Path) -> None:
        """Write the whole model into one safetensors file, whatever the plan; every rank calls it.

        A weight that layers share is in it once: read it with ``safetensors.torch.load_model(model, path)``.

        Args:
            path: Of the file, on a file system that all ranks share. Its folder is made.

        Raises:
            CheckpointError: It could not be written.
        """
        from efftrain.training.checkpoint import export_model

        export_model(path, self)

    def step(self, inputs: Tensor, targets: Tensor) -> StepResult:
        """One update from this replica's share of the batch.

        Args:
            inputs: Shape ``(B, ...)``; ``B`` is a multiple of ``micro_batches``.
            targets: int64, shape ``(B,)`` or ``(B, T)``.

        Raises:
            ReplicaError: The weights of the ranks are no longer equal (looked at every ``check_replicas_every`` steps).
            NonFiniteError: inf or NaN in ``MAX_SKIPPED_IN_A_ROW`` steps one after the other. Before that such a step
                is skipped by all ranks alike.
        """
        lr = self.optimizer_config.lr_at(self.num_steps, self.total_steps)
        self.optimizer.zero_grad(set_to_none=True)
        buffers = [buffer.clone() for buffer in self.model.buffers()]  # the forward pass changes running statistics
        local_loss = self.compute.backward(inputs, targets)
        agreed = self.exchange.agree(self.model, local_loss, took_part=self.exchange.finish())
        self.exchange.settle(ok=agreed.healthy)
        self.num_steps += 1
        if not agreed.healthy:
            for buffer, before in zip(self.model.buffers(), buffers, strict=True):
                buffer.copy_(before)
            self._count_skip()
            return StepResult(float("nan"), float("nan"), lr, skipped=True)
        self._skipped_in_a_row = 0
        if self.step_config.clip_norm is not None:
            # Some of a divided model's gradients are DTensors, some are not: torch cannot scale both in one kernel.
            one_by_one = False if self.exchange.is_divided else None
            limit = self.step_config.clip_norm
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), limit, agreed.grad_norm, foreach=one_by_one)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.exchange.descend(lr)
        self.optimizer.step()
        every = self.step_config.check_replicas_every
        if every and self.num_steps % every == 0:
            self.exchange.check_replicas(self.model)
        return StepResult(agreed.loss, float(agreed.grad_norm), lr, skipped=False)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Model and optimizer: tensors by name, and numbers that JSON can hold.

        What this rank holds of them: all, equal on all ranks, unless ``exchange.is_divided``.
        """
        tensors = self._weights()
        numbers: dict[str, Any] = {
            "num_steps": self.num_steps,
            "num_skipped": self.num_skipped,
            "skipped_in_a_row": self._skipped_in_a_row,
            "optimizer": self.optimizer_config.name,
        }
        for name, parameter in self._trained().items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer/{name}/{key}"] = value
        return {name: value.detach().contiguous() for name, value in tensors.items()}, numbers

    def expect(self, shapes: Mapping[str, Sequence[int]], numbers: Mapping[str, Any]) -> dict[str, Tensor]:
        """The tensors that a checkpoint has to fill, of what this rank holds; ``load_state_dict`` takes them.

        Args:
            shapes: Of the whole tensors in the checkpoint.
            numbers: Of ``state_dict``.

        Raises:
            CheckpointError: The checkpoint is of another model or optimizer.
        """
        if numbers.get("optimizer") != self.optimizer_config.name:
            raise CheckpointError(
                f"checkpoint was written with optimizer {numbers.get('optimizer')!r}, this run has "
                f"{self.optimizer_config.name!r}; resume with the optimizer of the checkpoint"
            )
        own = self._weights()
        saved = {name for name in shapes if name.startswith("model/")}
        second = {f"model/{name}" for name, first in self._first_name.items() if name != first}
        foreign = saved & second if self.exchange.is_divided else saved - own.keys()
        for name in sorted(own.keys() | foreign):
            if name not in own or name not in saved or tuple(own[name].shape) != tuple(shapes[name]):
                expected = tuple(own[name].shape) if name in own else "no such tensor"
                found = tuple(shapes[name]) if name in saved else "no such tensor"
                raise CheckpointError(
                    f"checkpoint tensor {name.removeprefix('model/')!r}: expected {expected}, found {found}; is it of "
                    "another model?"
                )
        tensors = {name: torch.empty_like(value) for name, value in own.items()}
        trained = self._trained()
        for full, shape in shapes.items():
            kind, _, rest = full.partition("/")
            name, _, key = rest.rpartition("/")
            if kind != "optimizer" or (name not in trained and self.exchange.is_divided):
                continue
            like = trained.get(name)
            if like is not None and key == "step":
                like = torch.empty(())  # torch counts on the CPU, wherever the parameter is
            if like is None or tuple(shape) != tuple(like.shape):
                raise CheckpointError(
                    f"checkpoint tensor {full!r} of shape {tuple(shape)} fits no trained parameter here; are other "
                    "layers frozen?"
                )
            tensors[full] = torch.empty_like(like.detach())
        return tensors

    def load_state_dict(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` gave: the tensors of ``expect``, filled."""
        names = self.model.state_dict().keys()
        self.model.load_state_dict({name: tensors[f"model/{self._first_name[name]}"] for name in names})
        trained = self._trained()
        self.optimizer.state.clear()
        for full, value in tensors.items():
            kind, _, rest = full.partition("/")
            name, _, key = rest.rpartition("/")
            if kind == "optimizer":
                self.optimizer.state[trained[name]][key] = value
        self.num_steps, self.num_skipped = int(numbers["num_steps"]), int(numbers["num_skipped"])
        self._skipped_in_a_row = int(numbers["skipped_in_a_row"])

    def _weights(self) -> dict[str, Tensor]:
        """What this rank holds of the model, each tensor once, under the name that all plans call it by."""
        return {f"model/{self._first_name[name]}": value for name, value in self.model.state_dict().items()}

    def _trained(self) -> dict[str, Tensor]:
        """The optimizer's parameters by name."""
        known = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        return {self._first_name[name]: p for name, p in self.model.named_parameters() if id(p) in known}

    def _count_skip(self) -> None:
        self.num_skipped += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise NonFiniteError(
                f"loss or gradient was inf or NaN in {MAX_SKIPPED_IN_A_ROW} steps one after the other, up to step "
                f"{self.num_steps}; lower optimizer.lr, set step.clip_norm, or look at the data"
            )

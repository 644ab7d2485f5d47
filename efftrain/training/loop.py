"""The training loop of every cluster recipe: epochs over a data set, evaluation, metrics, checkpoints, resume.

The order of the data depends on seed and epoch alone, and a batch is cut among the ranks, so any world size sees the
same batches and a run resumes at the very sample where it stopped.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from efftrain.data import Dataset
from efftrain.errors import ConfigError, DataError
from efftrain.report.run import RunFolder
from efftrain.training.checkpoint import Saver, complete_checkpoints, load_checkpoint
from efftrain.training.job import Job, StepResult
from efftrain.training.objective import label_loss


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long and how often."""

    epochs: int = 10
    batch_size: int = 64
    """Samples of one update, over all ranks and micro-batches together."""
    eval_every: int = 1
    """Epochs between evaluations; the last epoch is always evaluated. 0: only then."""
    eval_batch_size: int = 256
    checkpoint_every: int = 500
    """Updates between checkpoints. 0: only at the end."""
    background_checkpoints: bool = False
    """Write them while training goes on, from a copy; needs the memory of one."""
    log_every: int = 10
    """Updates between lines in ``metrics.jsonl``."""
    deterministic: bool = True
    """Only deterministic kernels; a little slower on a GPU."""

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch_size, self.eval_batch_size, self.log_every) < 1:
            raise ValueError("epochs, batch_size, eval_batch_size and log_every must be at least 1")
        if min(self.eval_every, self.checkpoint_every) < 0:
            raise ValueError("eval_every and checkpoint_every must not be negative")

    def steps_per_epoch(self, num_samples: int) -> int:
        """Updates of one epoch; the samples of an incomplete batch at its end wait for another shuffle.

        Raises:
            ConfigError: Not even one batch.
        """
        if num_samples < self.batch_size:
            raise ConfigError(f"loop.batch_size is {self.batch_size}, the data set has only {num_samples} samples")
        return num_samples // self.batch_size

    def check_pieces(self, num_replicas: int, micro_batches: int) -> None:
        """Refuse a batch that cannot be cut evenly.

        Raises:
            ConfigError: With the number that must divide it.
        """
        if self.batch_size % (num_replicas * micro_batches):
            raise ConfigError(
                f"loop.batch_size is {self.batch_size}, expected a multiple of {num_replicas * micro_batches}: "
                f"{num_replicas} ranks of the data axis x {micro_batches} micro_batches"
            )


@dataclass(frozen=True)
class Evaluation:
    """Means over a data set."""

    loss: float
    accuracy: float


@dataclass(frozen=True)
class FitResult:
    """How a run ended."""

    evaluation: Evaluation
    first_step: int
    """Updates that a checkpoint had done already; 0 for a run from the start."""
    num_steps: int
    num_skipped: int
    train_s: float
    """Wall time of this process; a resumed run does not know the time before."""
    totals: dict[str, float]
    """Sums of ``Exchange.stats`` over the steps, e.g. ``wire_bytes`` sent by this rank."""


def set_seed(seed: int, rank: int, *, deterministic: bool) -> None:
    """Seed torch on this rank; ranks differ so that dropout does.

    ``deterministic`` makes torch refuse kernels without a deterministic form.
    """
    torch.manual_seed(seed * 1_000_003 + rank)
    torch.use_deterministic_algorithms(deterministic, warn_only=True)


def fit(
    job: Job,
    train: Dataset,
    test: Dataset,
    config: LoopConfig,
    *,
    seed: int,
    run: RunFolder | None = None,
    checkpoints: Path | None = None,
    resume: bool = False,
    on_step: Callable[[int, StepResult], None] | None = None,
) -> FitResult:
    """Train ``job`` and evaluate it.

    Args:
        job: Of this rank.
        train: All training samples; every rank has them all and takes its share of each batch.
        test: For evaluation.
        config: How long and how often.
        seed: Of the data order.
        run: Where rank 0 writes its metrics.
        checkpoints: Folder of the checkpoints; ``None`` writes none.
        resume: Start from the newest checkpoint there, if any.
        on_step: Called after each update with the number of updates done; for progress bars.

    Raises:
        DataError: Labels are no integers, or none of the model's classes.
        ConfigError: The batch cannot be cut evenly among ranks and micro-batches, a data set is too small, or
            ``checkpoints`` holds those of another run.
        NonFiniteError: See ``Job.step``.
        CheckpointError: See ``Saver`` and ``load_checkpoint``.
    """
    exchange = job.exchange
    config.check_pieces(exchange.num_replicas, job.step_config.micro_batches)
    if not len(test):
        raise ConfigError("the test data set is empty; there is nothing to evaluate on")
    steps_per_epoch = config.steps_per_epoch(len(train))
    job.total_steps = total_steps = config.epochs * steps_per_epoch
    totals: dict[str, float] = {}
    restored = load_checkpoint(checkpoints, job, seed=seed) if resume and checkpoints is not None else None
    if restored is not None:
        totals.update(restored.extra.get("totals", {}))
    elif checkpoints is not None and complete_checkpoints(checkpoints):
        raise ConfigError(f"{checkpoints} holds checkpoints of an earlier run; resume it or choose another folder")
    if run is not None and resume:
        run.rewind(job.num_steps)
    saver = None if checkpoints is None else Saver(checkpoints, job, background=config.background_checkpoints)
    started, first_step = time.perf_counter(), job.num_steps
    for indices in _batches(len(train), config, seed, first_step=job.num_steps):
        share = len(indices) // exchange.num_replicas
        inputs, targets = _tensors(train, indices[exchange.replica * share : (exchange.replica + 1) * share])
        step_started = time.perf_counter()
        result = job.step(inputs, targets)
        stats = exchange.stats()
        for name, value in stats.items():
            totals[name] = totals.get(name, 0.0) + value
        step = job.num_steps
        if run is not None and (step % config.log_every == 0 or result.skipped or step == 1):
            step_s = time.perf_counter() - step_started
            norm = exchange.residual_norm()
            run.log("step", step=step, **vars(result), step_s=step_s, **stats, residual_norm=norm)
        if on_step is not None:
            on_step(step, result)
        epoch, inside = divmod(step, steps_per_epoch)
        if not inside and config.eval_every and epoch % config.eval_every == 0 and epoch < config.epochs:
            _evaluate_and_log(job, test, config, run, epoch, totals)
        due = config.checkpoint_every and step % config.checkpoint_every == 0 and step < total_steps
        if saver is not None and due:
            saver.save({"totals": totals})
    # The last checkpoint is written after the last evaluation, so a run that had finished has both.
    had_finished = restored is not None and restored.step == job.num_steps and restored.extra.get("finished")
    evaluation = _evaluate_and_log(job, test, config, None if had_finished else run, config.epochs, totals)
    if saver is not None:
        if not had_finished:
            saver.save({"totals": totals, "finished": True})
        saver.finish()
    train_s = time.perf_counter() - started
    return FitResult(evaluation, first_step, job.num_steps, job.num_skipped, train_s, totals)


@torch.no_grad()
def evaluate(job: Job, data: Dataset, batch_size: int = 256) -> Evaluation:
    """Mean loss and accuracy over ``data``; each replica takes its share of the samples.

    All replicas compute as many batches of one size, filled up with samples that do not count: ranks that share layers
    wait for each other in every one.
    """
    exchange = job.exchange
    exchange.sync_buffers(job.model)
    longest = -(-len(data) // exchange.num_replicas)
    size = min(batch_size, longest)
    loss = correct = count = 0.0
    for start in range(0, longest, size):
        places = (start + np.arange(size)) * exchange.num_replicas + exchange.replica
        inputs, targets = _tensors(data, np.minimum(places, len(data) - 1))
        logits = job.compute.logits(inputs)
        if logits is None:
            continue
        counted = torch.from_numpy((places < len(data)) & (start + np.arange(size) < longest)).to(logits.device)
        logits, targets = logits[counted], targets.to(logits.device)[counted]
        if not len(targets):
            continue
        logits, flat = logits.flatten(0, -2).float(), targets.flatten()
        loss += float(label_loss(logits, flat, reduction="sum"))
        correct += float((logits.argmax(-1) == flat).sum())
        count += flat.numel()
    loss, correct, count = exchange.sum([loss, correct, count])
    return Evaluation(loss / count, correct / count)


def _batches(num_samples: int, config: LoopConfig, seed: int, first_step: int) -> Iterator[np.ndarray[Any, Any]]:
    """Indices of each update's samples, from update ``first_step`` on."""
    steps_per_epoch = config.steps_per_epoch(num_samples)
    for epoch in range(first_step // steps_per_epoch, config.epochs):
        order = np.random.default_rng([seed, epoch]).permutation(num_samples)
        start = first_step - epoch * steps_per_epoch if epoch == first_step // steps_per_epoch else 0
        for step in range(start, steps_per_epoch):
            yield order[step * config.batch_size : (step + 1) * config.batch_size]


def _tensors(data: Dataset, indices: np.ndarray[Any, Any]) -> tuple[Tensor, Tensor]:
    inputs, targets = data.batch(indices)
    if targets.dtype.kind not in "iu":
        raise DataError(f"labels are {targets.dtype}, expected integers; convert them in the data set's batch()")
    return torch.from_numpy(np.ascontiguousarray(inputs)), torch.from_numpy(np.ascontiguousarray(targets)).long()


def _evaluate_and_log(
    job: Job, test: Dataset, config: LoopConfig, run: RunFolder | None, epoch: int, totals: dict[str, float]
) -> Evaluation:
    result = evaluate(job, test, config.eval_batch_size)
    if run is not None:
        run.log("eval", step=job.num_steps, epoch=epoch, loss=result.loss, accuracy=result.accuracy, **totals)
    return result

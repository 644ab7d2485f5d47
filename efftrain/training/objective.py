"""What is minimized: a function of model, inputs and targets."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from efftrain.data import Dataset
from efftrain.errors import ConfigError, DataError

Objective: TypeAlias = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""``(model, inputs, targets) -> mean loss``, a scalar tensor."""


_IGNORED = -100
"""A label that torch's cross-entropy leaves out."""


def cross_entropy(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean softmax cross-entropy in nats.

    Args:
        model: Gives logits of shape ``(B, C)``, or ``(B, T, C)`` for sequences.
        inputs: Shape ``(B, ...)``.
        targets: int64, shape ``(B,)`` or ``(B, T)``.

    Raises:
        DataError: A label is none of the model's classes (on a GPU torch stops with its own assertion).
    """
    return label_loss(model(inputs).flatten(0, -2).float(), targets.flatten())


def label_loss(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy of flat labels ``(N,)`` under logits ``(N, C)``, in nats.

    Raises:
        DataError: As ``cross_entropy``.
    """
    num_classes = logits.shape[-1]
    if type(logits) is not Tensor and not bool(_is_class(labels, num_classes).all()):
        raise _out_of_range(labels, num_classes)  # of divided classes torch takes it for another rank's
    try:
        return F.cross_entropy(logits, labels, reduction=reduction)
    except IndexError as error:
        raise _out_of_range(labels, num_classes) from error


def _is_class(labels: Tensor, num_classes: int) -> Tensor:
    return (labels == _IGNORED) | (labels >= 0) & (labels < num_classes)


def _out_of_range(labels: Tensor, num_classes: int) -> DataError:
    return DataError(
        f"labels run from {int(labels.min())} to {int(labels.max())}, the model has {num_classes} outputs; "
        f"expected labels from 0 to {num_classes - 1}"
    )


def check_distillation(temperature: float, weight: float) -> None:
    """Refuse values that ``Distillation`` cannot use.

    Raises:
        ConfigError: ``temperature`` is not a number above 0, or ``weight`` no share.
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise ConfigError(f"temperature is {temperature}, expected more than 0")
    if not 0 <= weight <= 1:
        raise ConfigError(f"weight is {weight}, expected a share in [0, 1]")


@dataclass(frozen=True)
class Distillation:
    """Learn from a teacher's soft answers beside the labels.

    ``weight * T^2 * KL(teacher || student at temperature T) + (1 - weight) * cross_entropy``

    Args:
        teacher: A trained module with the student's output shape. Put in eval mode; never updated.
        temperature: ``T > 0``; higher shows more of how the teacher ranks the wrong classes.
        weight: Share of the soft term, in ``[0, 1]``.

    Source: Hinton et al., Distilling the Knowledge in a Neural Network (arXiv:1503.02531), section 2.
    """

    teacher: nn.Module
    temperature: float = 2.0
    weight: float = 0.5

    def __post_init__(self) -> None:
        check_distillation(self.temperature, self.weight)
        self.teacher.eval().requires_grad_(False)

    def __call__(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean loss over the batch; shapes as in ``cross_entropy``."""
        logits = model(inputs).flatten(0, -2).float()
        with torch.no_grad():
            soft = F.log_softmax(self.teacher(inputs).flatten(0, -2).float() / self.temperature, dim=-1)
        student = F.log_softmax(logits / self.temperature, dim=-1)
        divergence = F.kl_div(student, soft, reduction="batchmean", log_target=True)
        hard = label_loss(logits, targets.flatten())
        return self.weight * self.temperature**2 * divergence + (1 - self.weight) * hard


def check_fit(name: str, model: nn.Module, data_name: str, data: Dataset) -> int:
    """Refuse a model that cannot read the data set or has too few outputs, before anything is written.

    Args:
        name: What the model is called in the message.
        model: A classifier: logits for each target. It is left in evaluation mode.
        data_name: What the data set is called.
        data: Its first sample is tried.

    Returns:
        The model's number of outputs.

    Raises:
        ConfigError: They do not fit.
    """
    what = f"{name} does not fit data set {data_name!r}"
    inputs, targets = data.batch(np.arange(1))
    place = next(itertools.chain(model.parameters(), model.buffers()), torch.empty(0)).device
    shape = "x".join(map(str, inputs.shape[1:]))
    try:
        with torch.no_grad():
            logits = model.eval()(torch.from_numpy(inputs).to(place))
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        raise ConfigError(f"{what}, whose samples are {shape} {inputs.dtype}: {error}") from error
    if not isinstance(logits, torch.Tensor) or logits.shape[:-1] != targets.shape:
        found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ConfigError(f"{what}: for one sample expected logits {(*targets.shape, 'classes')}, found {found}")
    num_classes = getattr(data, "num_classes", 0)
    if logits.shape[-1] < num_classes:
        raise ConfigError(f"{what}: it has {logits.shape[-1]} outputs, expected one for each of {num_classes} classes")
    return int(logits.shape[-1])

"""Optimizers and learning-rate schedules, by configuration."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from efftrain.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How weights move."""

    name: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.02
    """Peak learning rate."""
    momentum: float = 0.9
    """Of ``sgd``; ``adamw`` uses the betas 0.9 and 0.95."""
    weight_decay: float = 0.0
    """Decoupled for ``adamw``, added to the gradient for ``sgd``. Not applied to vectors (biases, norms)."""
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup_steps: int = 0
    """Steps over which the rate rises linearly from 0, before the schedule starts."""
    final_lr_ratio: float = 0.0
    """Where ``cosine`` ends, as a share of ``lr``."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"lr is {self.lr}, expected more than 0")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum is {self.momentum}, expected [0, 1)")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ValueError(f"weight_decay is {self.weight_decay}, expected 0 or more")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps is {self.warmup_steps}, expected 0 or more")
        if not 0 <= self.final_lr_ratio <= 1:
            raise ValueError(f"final_lr_ratio is {self.final_lr_ratio}, expected a share in [0, 1]")

    @property
    def is_entrywise(self) -> bool:
        """Whether a weight with a gradient of zero stays where it is: plain SGD."""
        return self.name == "sgd" and not self.momentum and not self.weight_decay

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer over the trainable parameters of ``model``, matrices and vectors in groups of their own.

        Raises:
            ConfigError: There are none.
        """
        trainable = [p for p in model.parameters() if p.requires_grad]
        if not trainable:
            raise ConfigError(f"model {type(model).__name__} has no trainable parameter; there is nothing to train")
        groups = [
            {"params": [p for p in trainable if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        # A kernel over many parameters takes plain ones or those of a mesh, not both.
        foreach = None if len({type(p.data) for p in trainable}) == 1 else False
        if self.name == "sgd":
            return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, foreach=foreach)
        return torch.optim.AdamW(groups, lr=self.lr, betas=(0.9, 0.95), foreach=foreach)

    def lr_at(self, step: int, total_steps: int | None) -> float:
        """Learning rate of update ``step``, counted from 0, of ``total_steps`` (``None``: not known, so no decay)."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.schedule == "constant" or total_steps is None:
            return self.lr
        progress = (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps)
        floor = self.final_lr_ratio
        return self.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))

"""What is to be trained, as far as the planner has to know it."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from efftrain.data import load_dataset
from efftrain.models import build_model
from efftrain.parallel.recipe import ClusterRecipe
from efftrain.training import OptimizerConfig


@dataclass(frozen=True)
class Setting:
    """What is to be trained.

    Attributes:
        model: The whole model, on the CPU.
        sample: Inputs of one sample, shape ``(1, ...)``.
        batch_size: Samples of one update, over all replicas.
        optimizer: Optimizer.
        micro_batches: Pieces of a replica's batch, without a pipeline.
        bf16: It runs under autocast.
        clips: Averaged gradients are clipped.
    """

    model: nn.Module
    sample: Tensor
    batch_size: int
    optimizer: OptimizerConfig
    micro_batches: int = 1
    bf16: bool = False
    clips: bool = False


def setting_of(recipe: ClusterRecipe) -> Setting:
    """Build the model and read one sample.

    Raises:
        EfftrainError: Model or data of the recipe cannot be had.
    """
    torch.manual_seed(recipe.seed)
    model = build_model(recipe.model.name, **recipe.model.options)
    inputs, _ = load_dataset(recipe.data.name, "train", **recipe.data.options).batch(np.arange(1))
    return Setting(
        model=model,
        sample=torch.from_numpy(np.ascontiguousarray(inputs)),
        batch_size=recipe.loop.batch_size,
        optimizer=recipe.optimizer,
        micro_batches=recipe.step.micro_batches,
        bf16=recipe.step.precision != "fp32",
        clips=recipe.step.clip_norm is not None,
    )

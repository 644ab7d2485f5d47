"""From a recipe to what the planner needs of it."""

import numpy as np
import torch

from efftrain.data import load_dataset
from efftrain.models import build_model
from efftrain.parallel.planner import Setting
from efftrain.parallel.recipe import ClusterRecipe


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
        bf16=recipe.step.precision == "bf16",
    )

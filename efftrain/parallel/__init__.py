"""Cluster training: one plan over torch.distributed, started by torchrun or alone."""

from efftrain.parallel.plan import Plan
from efftrain.parallel.recipe import ClusterRecipe, train

__all__ = ["ClusterRecipe", "Plan", "train"]

"""Cluster training: one plan over torch.distributed or Horovod, started by a launcher or alone."""

from efftrain.parallel.hooks import compress_ddp, compress_fsdp
from efftrain.parallel.plan import Plan
from efftrain.parallel.recipe import ClusterRecipe, train
from efftrain.parallel.sync import GradSync, SyncConfig

__all__ = ["ClusterRecipe", "GradSync", "Plan", "SyncConfig", "compress_ddp", "compress_fsdp", "train"]

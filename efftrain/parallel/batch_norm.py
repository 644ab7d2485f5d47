"""Batch norm under a plan: the one layer of torch whose result depends on which samples it sees together."""

import warnings
from collections.abc import Mapping

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from efftrain.errors import ConfigError


def warn_of_pieces(model: nn.Module, num_replicas: int, num_micro_batches: int) -> None:
    """Say once that a batch in pieces is not the batch of one process, if the model has batch norm.

    Args:
        model: The whole model.
        num_replicas: Ranks that share a batch.
        num_micro_batches: Pieces of a replica's share.
    """
    found = batch_norms(model)
    synced = num_micro_batches == 1 and all(isinstance(layer, nn.SyncBatchNorm) for layer in found.values())
    if not found or synced or num_replicas * num_micro_batches == 1:
        return
    warnings.warn(
        f"{_described(found)} normalizes each of the {num_replicas * num_micro_batches} pieces of a batch (replicas x "
        "micro-batches) by its own samples, as torch does: gradients are not those of one process. On GPUs "
        "torch.nn.SyncBatchNorm.convert_sync_batchnorm(model) makes replicas alike; nn.GroupNorm is right with every "
        "plan",
        stacklevel=3,
    )


def refuse_waiting(model: nn.Module) -> None:
    """Refuse synchronized batch norm in a pipeline, where other stages would have to answer it.

    Raises:
        ConfigError: There is some over all ranks.
    """
    found = {
        name: layer
        for name, layer in batch_norms(model).items()
        if isinstance(layer, nn.SyncBatchNorm) and layer.process_group is None
    }
    if found:
        raise ConfigError(
            f"{_described(found)} asks all ranks, and those of other pipeline stages do not answer; take nn.GroupNorm, "
            "or set parallel.pipeline=1"
        )


def refuse_twice(model: nn.Module, blocks: list[str]) -> None:
    """Refuse running statistics in blocks that are computed again: they would move twice a step.

    Raises:
        ConfigError: There are some.
    """
    found = {
        name: layer
        for name, layer in batch_norms(model).items()
        if layer.track_running_stats and any(f"{name}.".startswith(f"{block}.") for block in blocks)
    }
    if found:
        raise ConfigError(
            f"{_described(found)} would update its running statistics twice a step where parallel.checkpointing "
            "computes a block again; take nn.GroupNorm, or set parallel.checkpointing=none"
        )


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """The layers of batch norm by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, _BatchNorm)}


def _described(found: Mapping[str, _BatchNorm]) -> str:
    name, layer = next(iter(found.items()))
    return f"{type(layer).__name__} {name!r}{f' (and {len(found) - 1} more)' if len(found) > 1 else ''}"

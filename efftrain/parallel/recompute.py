"""How the blocks of a model are computed: again in the backward pass, for less memory, or compiled, for less time."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from efftrain.errors import ConfigError
from efftrain.parallel.batch_norm import refuse_twice
from efftrain.parallel.stages import StageCut

Checkpointing: TypeAlias = Literal["none", "selective", "full"]

_aten = torch.ops.aten
_SAVED = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._scaled_mm.default,
    _aten.convolution.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}
"""What ``selective`` keeps: the results that cost most to compute again."""


def blocks(model: nn.Module) -> list[str]:
    """Names of the layers that are computed again as a whole: the members of the model's ``ModuleList``s."""
    return [
        f"{name}.{child}" if name else child
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        for child, _ in module.named_children()
    ]


def check_blocks(model: nn.Module, kind: Checkpointing) -> None:
    """Refuse a model without blocks, or with blocks that must not be computed twice.

    Raises:
        ConfigError: With the remedy.
    """
    if not blocks(model):
        raise ConfigError(
            f"{type(model).__name__} has no ModuleList of blocks, which parallel.checkpointing={kind} works on; put "
            "its layers into one or set parallel.checkpointing=none"
        )
    refuse_twice(model, blocks(model))


def blocks_of(model: nn.Module, cut: StageCut) -> list[str]:
    """Those blocks that one stage of the model has as a whole."""
    return [name for name in blocks(model) if any(f"{name}.".startswith(f"{called}.") for called in cut.names)]


def recompute(model: nn.Module, kind: Checkpointing, names: Sequence[str] | None = None) -> None:
    """Let each block of a model forget its activations and compute them again in the backward pass.

    Args:
        model: Its blocks' ``forward`` is replaced; names and parameters stay.
        kind: ``full`` keeps only what goes into a block, and costs about a third more compute; ``selective`` also
            keeps what its matrix products, convolutions and attentions gave, and costs little.
        names: Of the blocks, where the model is a part of one that has ``ModuleList``s.

    Raises:
        ConfigError: The model has no blocks.

    Source: Chen et al., Training Deep Nets with Sublinear Memory Cost (arXiv:1604.06174); selective: Korthikanti et
        al., arXiv:2205.05198, section 5.
    """
    if kind == "none":
        return
    if names is None:
        check_blocks(model, kind)
        names = blocks(model)
    contexts: dict[str, Any] = {}
    if kind == "selective":
        contexts["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    for name in names:
        block = model.get_submodule(name)
        inner: Callable[..., Any] = block.forward
        block.forward = partial(checkpoint, inner, use_reentrant=False, **contexts)


def compile_blocks(model: nn.Module) -> None:
    """Compile each block with ``torch.compile``, or the model as a whole if it has none. Names and parameters stay.

    Blocks of the same kind share their code, so the first step waits for one of them. After ``recompute`` and before
    ``fully_shard``.
    """
    for module in [model.get_submodule(name) for name in blocks(model)] or [model]:
        module.compile()


def _policy(_: SelectiveCheckpointContext, op: object, *__: object, **___: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _SAVED else CheckpointPolicy.PREFER_RECOMPUTE

"""Model families, plain torch modules. Names are cheap: torch is imported when a model is built or loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from efftrain.models.registry import MODELS, build_model, model_class

if TYPE_CHECKING:
    from pathlib import Path

    from efftrain.models.pretrained import Pretrained

__all__ = ["MODELS", "build_model", "load_pretrained", "model_class"]


def load_pretrained(folder: str | Path) -> Pretrained:
    """The model that ``save_pretrained`` wrote to ``folder``, whichever of ``MODELS`` it is.

    Returns:
        The model, with its weights, in training mode like a fresh one.

    Raises:
        CheckpointError: Files are missing or damaged, or do not fit the model they name. See ``Pretrained``.
    """
    from efftrain.models.pretrained import load_pretrained as load

    return load(folder)

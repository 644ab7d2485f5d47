"""A user's PyTorch module -> ``FloatGraph``: traced by ``reader``, understood by ``operators``, simplified by
``canonicalize``."""

from efftrain.ondevice.frontend.canonicalize import MAX_TERMS, canonicalize
from efftrain.ondevice.frontend.operators import SUPPORTED
from efftrain.ondevice.frontend.reader import read_module

__all__ = ["MAX_TERMS", "SUPPORTED", "canonicalize", "read_module"]

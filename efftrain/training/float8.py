"""Linear layers whose three matrix products are in 8-bit floats, by torchao.

Forward in e4m3, gradients of outputs in e5m2, one scale a tensor, found anew at each step; sums in 16 or 32 bits,
weights in fp32. Source: Micikevicius et al., FP8 Formats for Deep Learning (arXiv:2209.05433), sections 3 and 4.
"""

import importlib.util
import logging

import torch
from torch import nn

from efftrain.errors import ConfigError

_MULTIPLE = 16
"""Of rows and columns, which the units ask for."""
_CAPABILITY = (8, 9)


def check_float8(model: nn.Module) -> None:
    """Refuse what ``to_float8`` cannot do.

    Args:
        model: On its device.

    Raises:
        ConfigError: See ``to_float8``.
    """
    device = next(model.parameters()).device
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _CAPABILITY:
        raise ConfigError(
            f"{torch.cuda.get_device_name(device)} has no 8-bit floats (compute capability 8.9 or above has); set "
            "step.precision=bf16"
        )
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError(
            "step.precision=float8 needs torchao; pip install 'efftrain[float8]', or set step.precision=bf16"
        )
    if not any(_is_float8(module) or _fits(module, name) for name, module in model.named_modules()):
        raise ConfigError(
            f"step.precision=float8 changes linear layers inside a model whose sizes are multiples of {_MULTIPLE}; "
            f"{type(model).__name__} has none. Set step.precision=bf16."
        )


def to_float8(model: nn.Module) -> None:
    """Let the linear layers of a model compute in 8-bit floats, in place; names and parameters stay.

    Layers whose sizes are no multiples of 16 stay as they are, and so do subclasses of ``nn.Linear`` and layers with
    hooks, which may do more than a product. Before ``recompute`` and ``compile_blocks``. Doing it again does nothing.

    Args:
        model: On its device. A CPU does it too, to try it out: it has no units for it and gains nothing.

    Raises:
        ConfigError: torchao is not there, the GPU has no 8-bit floats, or no layer can be changed.
    """
    check_float8(model)
    if any(map(_is_float8, model.modules())):
        return
    for name in ("torchao", "torch.utils._pytree"):  # they tell of kernels for other machines, and of one another
        logging.getLogger(name).setLevel(logging.ERROR)
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    # A batch of any size: rows are filled up where they are multiplied along.
    convert_to_float8_training(model, config=Float8LinearConfig(pad_inner_dim=True), module_filter_fn=_fits)


def _is_float8(module: nn.Module) -> bool:
    return type(module).__module__ == "torchao.float8.float8_linear"


def _fits(module: nn.Module, name: str) -> bool:
    """A layer without a name is the whole model, which cannot be changed in place."""
    if not name or type(module) is not nn.Linear or "forward" in vars(module):
        return False
    if any(value for key, value in vars(module).items() if key.endswith("_hooks")):
        return False
    return module.in_features % _MULTIPLE == 0 and module.out_features % _MULTIPLE == 0

"""Models by name, and a user's own by ``file.py:Class``. Importing this loads no torch."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, cast

from efftrain.config import load_attribute
from efftrain.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from efftrain.models.pretrained import Pretrained

# Name -> module and class.
_CLASSES: Mapping[str, tuple[str, str]] = {
    "watch-cnn": ("efftrain.models.watch_cnn", "WatchCNN"),
    "fashion-cnn": ("efftrain.models.fashion_cnn", "FashionCNN"),
    "mlp-10m": ("efftrain.models.mlp", "MLP"),
    "char-transformer": ("efftrain.models.char_transformer", "CharTransformer"),
    "resnet8": ("efftrain.models.resnet8", "ResNet8"),
    "ds-cnn": ("efftrain.models.separable", "DSCNN"),
    "mobilenet-v1-0.25": ("efftrain.models.separable", "MobileNetV1Quarter"),
    "fc-autoencoder": ("efftrain.models.fc_autoencoder", "FCAutoencoder"),
    "mcunet-5fps": ("efftrain.models.inverted_residual", "MCUNet5fps"),
    "mobilenet-v2-w0.35": ("efftrain.models.inverted_residual", "MobileNetV2W035"),
    "proxyless-w0.3": ("efftrain.models.inverted_residual", "ProxylessW03"),
}

MODELS: tuple[str, ...] = tuple(_CLASSES)
"""Names that ``build_model`` knows."""


def model_class(name: str) -> type[Pretrained]:
    """The class behind one of ``MODELS``.

    Raises:
        ConfigError: Unknown name; the message gives the nearest and lists all.
    """
    if name not in _CLASSES:
        near = difflib.get_close_matches(name.lower(), MODELS, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"Unknown model {name!r}.{hint} Known: {', '.join(MODELS)}; or path/to/file.py:Class for your own."
        )
    module, attribute = _CLASSES[name]
    return cast("type[Pretrained]", getattr(importlib.import_module(module), attribute))


def build_model(name: str, **options: object) -> nn.Module:
    """A model with fresh weights, drawn from torch's global generator (seed it with ``torch.manual_seed``).

    Args:
        name: One of ``MODELS``; or ``path/to/file.py:Class``, where ``Class`` is a module class or a function that
            returns a module. The file is run: give only files you trust.
        options: Fields of the model's config (``width=64``), or arguments of your own class.

    Raises:
        ConfigError: Unknown name or option, a value out of its range, or a file that gives no module.
    """
    if ".py:" in name:
        return _build_own(name, options)
    return model_class(name).from_config(options)


def _build_own(spec: str, options: Mapping[str, object]) -> nn.Module:
    from torch import nn

    found, attribute = load_attribute(spec, "Model"), spec.rpartition(":")[2]
    if isinstance(found, nn.Module):
        if options:
            raise ConfigError(f"Model {spec!r} is a module already, so it takes no options; found {sorted(options)}.")
        return found
    if not callable(found):
        raise ConfigError(f"Model {spec!r}: expected a class or function, found {type(found).__name__}.")
    make = cast(Callable[..., object], found)
    try:
        model = make(**options)
    except Exception as error:  # the user's code may raise anything
        what = str(error) or type(error).__name__
        raise ConfigError(f"Model {spec!r}: calling {attribute} with {dict(options)} failed ({what}).") from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"Model {spec!r}: expected a torch.nn.Module, found {type(model).__name__}.")
    return model

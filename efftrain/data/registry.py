"""Data sets by name, and a user's own by ``file.py:name``."""

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import cast

from efftrain.config import load_attribute
from efftrain.data.dataset import Dataset
from efftrain.errors import ConfigError

# Name -> module and function. Imported on use: reading one data set must not cost the import of all.
_LOADERS: Mapping[str, tuple[str, str]] = {
    "watch": ("efftrain.data.watch", "watch_split"),
    "digits": ("efftrain.data.digits", "load_digits"),
    "fashion-mnist": ("efftrain.data.fashion_mnist", "load_fashion_mnist"),
    "pytext": ("efftrain.data.pytext", "load_pytext"),
}

DATASETS: tuple[str, ...] = tuple(_LOADERS)
"""Names that ``load_dataset`` knows."""


def load_dataset(spec: str, split: str = "train", **options: object) -> Dataset:
    """A data set by name, or your own.

    Args:
        spec: One of ``DATASETS``; or ``path/to/file.py:name``, where ``name`` is a ``Dataset``, or something to call
            with ``split`` that returns one. The file is run: give only files you trust.
        split: ``"train"`` or ``"test"``; ``watch`` has ``"unseen"`` too.
        options: Passed on to the loader: ``folder`` of ``fashion-mnist``, ``context`` of ``pytext``.

    Returns:
        The data set. Equal arguments give equal samples in an equal order.

    Raises:
        ConfigError: Unknown name (the message gives the nearest and lists all), split or option; or a file of the
            user's that cannot be loaded or holds no data set.
        DataError: A data file is missing or corrupt.
    """
    if ".py:" in spec:
        return _load_own(spec, split, options)
    if spec not in _LOADERS:
        near = difflib.get_close_matches(spec.lower(), DATASETS, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"Unknown data set {spec!r}.{hint} Known: {', '.join(DATASETS)}; or path/to/file.py:name for your own."
        )
    module, function = _LOADERS[spec]
    loader = cast(Callable[..., Dataset], getattr(importlib.import_module(module), function))
    _check_options(f"Data set {spec}", loader, options)
    return loader(split=split, **options)


def _check_options(what: str, loader: Callable[..., object], options: Mapping[str, object]) -> None:
    known = [name for name in inspect.signature(loader).parameters if name != "split"]
    for name in options:
        if name not in known:
            raise ConfigError(f"{what} has no option {name!r}. Expected: {', '.join(known) or 'none'}.")


def _load_own(spec: str, split: str, options: Mapping[str, object]) -> Dataset:
    found, name = load_attribute(spec, "Data set"), spec.rpartition(":")[2]
    # A class has the two methods too, so ask for an instance before the protocol is checked.
    if callable(found) and (inspect.isclass(found) or not isinstance(found, Dataset)):
        make = cast(Callable[..., object], found)
        try:
            found = make(split=split, **options)
        except TypeError as error:
            raise ConfigError(f"Data set {spec!r}: calling {name}(split={split!r}) failed ({error}).") from error
    elif options:
        raise ConfigError(f"Data set {spec!r} is not a callable, so it takes no options; found {', '.join(options)}.")
    if not isinstance(found, Dataset):
        raise ConfigError(
            f"Data set {spec!r}: expected an object with __len__() and batch(indices), found {type(found).__name__}."
        )
    return found

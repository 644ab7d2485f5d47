"""A user's own model, data set or function, named ``path/to/file.py:name`` in a recipe."""

import hashlib
import importlib.util
import sys
from pathlib import Path

from efftrain.errors import ConfigError


def load_attribute(spec: str, what: str) -> object:
    """Run a user's Python file and return one name of it. Give only files you trust.

    The file is run anew on every call, under a module name of its own in ``sys.modules``, without which dataclasses
    whose annotations are strings cannot be made. Its folder does not join the import path.

    Args:
        spec: ``path/to/file.py:name``.
        what: What is loaded, e.g. ``"Model"``; starts each message.

    Raises:
        ConfigError: No such file, it fails when it is run, or it has no such name (the message lists those it has).
    """
    file, _, name = spec.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise ConfigError(f"{what} {spec!r}: there is no file {path}. Expected path/to/file.py:name.")
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    module_spec = importlib.util.spec_from_file_location(f"efftrain_user_{path.stem}_{digest}", path)
    if module_spec is None or module_spec.loader is None:
        raise ConfigError(f"{what} {spec!r}: {path} is not a Python file.")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a script without a __main__ guard may exit
        del sys.modules[module_spec.name]
        raise ConfigError(f"{what} {spec!r}: running {path} failed ({type(error).__name__}: {error}).") from error
    found: object = getattr(module, name, None)
    if found is None:
        public = [public for public in vars(module) if not public.startswith("_")]
        raise ConfigError(f"{what} {spec!r}: {path} has no {name!r}. It has: {', '.join(public) or 'nothing'}.")
    return found

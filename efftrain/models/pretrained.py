"""Saving and loading a model as a folder of ``model.safetensors`` and ``config.json``. No pickle.

``config.json`` names the model, its config, and the size and SHA-256 of the weights: a safetensors file with a flipped
bit often still parses, so a parse proves nothing. Both files are written beside their final names and then renamed,
the weights first. A process killed between the two renames leaves a folder that is refused, never a mixture that loads.
"""

import dataclasses
import hashlib
import json
import os
import tempfile
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, TypeVar

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from efftrain.errors import CheckpointError, ConfigError
from efftrain.models.registry import MODELS, model_class

FORMAT = "efftrain-model"
FORMAT_VERSION = 1
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"

_CONFIG_LIMIT_BYTES = 1 << 20
_KEYS = {"format", "version", "name", "config", "weights_bytes", "weights_sha256"}

Model = TypeVar("Model", bound="Pretrained")


class Pretrained(nn.Module):
    """Base of the shipped models: a config, an input shape, and saving and loading.

    A subclass sets ``name`` and ``config_class`` (a frozen dataclass of ints, floats, bools, strings and tuples of ints
    that checks its values), takes the config as its only argument and passes it on to ``super().__init__``.
    """

    name: ClassVar[str]
    config_class: ClassVar[type]
    input_dtype: ClassVar[torch.dtype] = torch.float32
    config: object

    def __init__(self, config: object) -> None:
        super().__init__()
        self.config = config

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input, without the batch."""
        raise NotImplementedError(f"{type(self).__name__} must define input_shape")

    def example_input(self, batch_size: int = 1) -> Tensor:
        """Zeros of shape ``(batch_size, *input_shape)`` and the model's input dtype, for tracing and profiling."""
        return torch.zeros((batch_size, *self.input_shape), dtype=self.input_dtype)

    @classmethod
    def from_config(cls: type[Model], options: Mapping[str, object] | None = None) -> Model:
        """A model with fresh weights.

        Args:
            options: Fields of the config by name; those left out have their defaults. Lists count as tuples.

        Raises:
            ConfigError: An unknown field, a value of the wrong type or out of its range.
        """
        return cls(_make_config(cls.name, cls.config_class, options or {}))

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the model to ``folder``, which is made if need be; a model that was there is replaced.

        Returns:
            The folder.

        Raises:
            CheckpointError: The folder cannot be written.
        """
        target = Path(folder)
        tensors = {key: value.detach().cpu().contiguous() for key, value in self.state_dict().items()}
        weights = save_tensors(tensors)
        config = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "name": self.name,
            "config": dataclasses.asdict(self.config),  # type: ignore[call-overload]
            "weights_bytes": len(weights),
            "weights_sha256": hashlib.sha256(weights).hexdigest(),
        }
        try:
            target.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target, prefix=".saving-") as temporary:
                written = []
                for name, data in ((WEIGHTS_FILE, weights), (CONFIG_FILE, json.dumps(config, indent=2).encode())):
                    path = Path(temporary) / name
                    with path.open("wb") as stream:
                        stream.write(data)
                        stream.flush()
                        os.fsync(stream.fileno())
                    written.append(path)
                for path in written:
                    path.replace(target / path.name)
        except OSError as error:
            raise CheckpointError(f"{target}: the model cannot be written ({error.strerror or error}).") from error
        return target

    @classmethod
    def from_pretrained(cls: type[Model], folder: str | Path) -> Model:
        """A model that ``save_pretrained`` wrote. Torch's random state is left as it was.

        Raises:
            CheckpointError: Files are missing, damaged or of another model or format version; or a tensor is missing,
                unknown, or of another shape or dtype. The message names the file or tensor, what was expected and what
                was found.
        """
        source = Path(folder)
        header = _read_header(source)
        if header["name"] != cls.name:
            raise CheckpointError(
                f"{source / CONFIG_FILE}: expected a model {cls.name!r}, found {header['name']!r}. "
                "Use efftrain.models.load_pretrained to load whichever model a folder holds."
            )
        try:
            config = _make_config(cls.name, cls.config_class, typing.cast("Mapping[str, object]", header["config"]))
            with torch.random.fork_rng(devices=[]):
                model = cls(config)
        except ConfigError as error:
            raise CheckpointError(f"{source / CONFIG_FILE}: {error}") from error
        model.load_state_dict(_read_weights(source, header, model.state_dict()))
        return model


def load_pretrained(folder: str | Path) -> Pretrained:
    """See ``efftrain.models.load_pretrained``."""
    source = Path(folder)
    name = str(_read_header(source)["name"])
    if name not in MODELS:
        raise CheckpointError(
            f"{source / CONFIG_FILE}: expected one of the models {', '.join(MODELS)}, found {name!r}. "
            "A model class of your own is loaded with its own from_pretrained."
        )
    return model_class(name).from_pretrained(source)


def _read_header(folder: Path) -> dict[str, object]:
    path = folder / CONFIG_FILE
    try:
        with path.open("rb") as stream:
            data = stream.read(_CONFIG_LIMIT_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}).") from error
    if len(data) > _CONFIG_LIMIT_BYTES:
        raise CheckpointError(f"{path}: expected at most {_CONFIG_LIMIT_BYTES} bytes, found more.")
    try:
        header = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected JSON, found something else ({error}).") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise CheckpointError(f'{path}: expected "format": "{FORMAT}", found another kind of file.')
    if header.get("version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: expected format version {FORMAT_VERSION}, found {header.get('version')!r}. "
            "Load it with the efftrain that wrote it, and save it again."
        )
    if set(header) != _KEYS:
        raise CheckpointError(f"{path}: expected the keys {sorted(_KEYS)}, found {sorted(header)}.")
    for key, kind in (("name", str), ("config", dict), ("weights_bytes", int), ("weights_sha256", str)):
        if type(header[key]) is not kind:
            raise CheckpointError(f"{path}: expected {key} of type {kind.__name__}, found {header[key]!r}.")
    return header


def _read_weights(folder: Path, header: Mapping[str, object], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    path = folder / WEIGHTS_FILE
    try:
        found_bytes = path.stat().st_size
        if found_bytes != header["weights_bytes"]:
            raise CheckpointError(f"{path}: expected {header['weights_bytes']} bytes, found {found_bytes}.")
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}).") from error
    digest = hashlib.sha256(data).hexdigest()
    if digest != header["weights_sha256"]:
        raise CheckpointError(
            f"{path}: expected SHA-256 {header['weights_sha256']}, found {digest}. "
            "The file is damaged, or saving was interrupted; save the model again."
        )
    try:
        tensors = load_tensors(data)
    # The parser has its own exceptions, and dtypes torch lacks raise KeyError.
    except Exception as error:
        raise CheckpointError(
            f"{path}: expected safetensors, found bytes that do not parse ({type(error).__name__}: {error})."
        ) from error
    # In the model's order: the order of the parsed tensors differs from run to run.
    for key in sorted(set(tensors) - set(wanted)):
        raise CheckpointError(f"{path}: tensor {key!r} is unknown; expected {', '.join(wanted)}.")
    for key in wanted:
        tensor = tensors.get(key)
        if tensor is None:
            raise CheckpointError(f"{path}: tensor {key!r} is missing; found {', '.join(sorted(tensors)) or 'none'}.")
        if tensor.shape != wanted[key].shape or tensor.dtype != wanted[key].dtype:
            raise CheckpointError(
                f"{path}: tensor {key!r}: expected {wanted[key].dtype} of shape {tuple(wanted[key].shape)}, "
                f"found {tensor.dtype} of shape {tuple(tensor.shape)}."
            )
    return tensors


def _make_config(name: str, config_class: type, options: Mapping[str, object]) -> object:
    """Build a config from plain values, strictly: JSON and command lines are where these come from."""
    hints = typing.get_type_hints(config_class)
    values: dict[str, object] = {}
    for key, value in options.items():
        if key not in hints:
            raise ConfigError(f"Model {name} has no option {key!r}. Expected: {', '.join(hints)}.")
        if isinstance(value, list):
            value = tuple(value)
        if not _matches(value, hints[key]):
            expected = getattr(hints[key], "__name__", None) if isinstance(hints[key], type) else str(hints[key])
            if isinstance(hints[key], types.GenericAlias):
                expected = str(hints[key])
            raise ConfigError(f"Model {name}, option {key}: expected {expected}, found {value!r}.")
        values[key] = value
    return config_class(**values)


def _matches(value: object, hint: object) -> bool:
    if hint == tuple[int, ...]:
        return isinstance(value, tuple) and all(type(item) is int for item in value)
    if hint is float:
        return type(value) in (int, float)
    return type(value) is hint


def require(condition: bool, name: str, expected: str, config: object) -> None:
    """Check one rule of a config.

    Raises:
        ConfigError: ``condition`` is False; the message gives the rule and the config.
    """
    if not condition:
        raise ConfigError(f"Model {name}: expected {expected}, found {config}.")

"""TOML -> frozen dataclass, and back.

Types that a field may have: bool, int, float, str, ``Literal``, ``X | None``, ``tuple[X, ...]``, ``dict[str, X]`` and
other dataclasses. A type that checks its own values does so in ``__post_init__`` and raises ``ValueError``; the section
is put in front of its message.
"""

import dataclasses
import difflib
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tomli_w

from efftrain.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")


def load_recipe(cls: type[T], path: Path | str, overrides: Sequence[str] = (), what: str = "recipe") -> T:
    """Read a recipe.

    Args:
        cls: Frozen dataclass of the whole recipe.
        path: TOML file.
        overrides: ``section.key=value`` each, from ``--set``; the value is TOML, a bare word is a string.
        what: What the file is, for messages.

    Raises:
        ConfigError: The file is missing or no TOML, a key is unknown (the nearest is named), a required key is
            missing, or a value has the wrong type or range. The message has file and key.
    """
    path = Path(path)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{what} {path} does not exist") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{what} {path} cannot be read as TOML: {error}") from error
    for override in overrides:
        _apply_override(table, override)
    try:
        return from_dict(cls, table)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def from_dict(cls: type[T], table: Mapping[str, Any], where: str = "") -> T:
    """Build dataclass ``cls`` from plain values, checking every key and type.

    Args:
        cls: A dataclass.
        table: Plain TOML or JSON values.
        where: Name of the enclosing section, for messages.

    Raises:
        ConfigError: As ``load_recipe``.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    for key in table:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1, cutoff=0)
            hint = f"nearest is {_join(where, near[0])!r}; " if near else ""
            raise ConfigError(f"unknown key {_join(where, key)!r}; {hint}known: {', '.join(fields)}")
    values = {key: _convert(hints[key], value, _join(where, key)) for key, value in table.items()}
    for name, spec in fields.items():
        required = spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ConfigError(f"key {_join(where, name)!r} is missing; it has no default")
    try:
        return cls(**values)
    except ValueError as error:
        raise ConfigError(f"section {where!r}: {error}" if where else str(error)) from error


def check_value(hint: Any, value: Any, where: str) -> None:
    """Refuse a value that a recipe could not give a field, for settings that are made in code.

    Args:
        hint: Type of the field; no dataclass.
        value: What it was given.
        where: Name of the field, for the message.

    Raises:
        ConfigError: Another type, or none of the words; the nearest is named.
    """
    _convert(hint, value, where)


def to_dict(config: Any) -> dict[str, Any]:
    """Plain values of a config dataclass, ``None`` left out, tuples as lists: what TOML and JSON can hold."""
    return {
        f.name: _plain(getattr(config, f.name))
        for f in dataclasses.fields(config)
        if f.init and getattr(config, f.name) is not None
    }


def dump_toml(config: Any) -> str:
    """The resolved recipe as TOML; ``from_dict`` of it gives an equal config."""
    return tomli_w.dumps(to_dict(config))


def _apply_override(table: dict[str, Any], override: str) -> None:
    path, found, text = override.partition("=")
    keys = [key.strip() for key in path.split(".")]
    if not found or not all(keys):
        raise ConfigError(f"--set {override!r} is not of the form section.key=value")
    try:
        parsed = tomllib.loads(f"value = {text}")
        value = parsed["value"] if len(parsed) == 1 else text  # a line break does not start a second key
    except (tomllib.TOMLDecodeError, RecursionError):
        value = text.strip()
    for depth, key in enumerate(keys[:-1]):
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {override!r}: {'.'.join(keys[: depth + 1])!r} is a value, not a section")
    table[keys[-1]] = value


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:  # in code; TOML has no such value
            return None
        inner = [a for a in args if a is not type(None)]
        if len(inner) == 1:
            return _convert(inner[0], value, where)
        for option in inner:
            try:
                return _convert(option, value, where)
            except ConfigError:
                continue
        raise _wrong(where, value, " or ".join(_name(a) for a in inner))
    if origin is typing.Literal:
        if value not in args or type(value) is not type(args[args.index(value)]):
            near = difflib.get_close_matches(str(value), [str(a) for a in args], n=1, cutoff=0.5)
            hint_text = f" (nearest: {near[0]!r})" if near else ""
            raise _wrong(where, value, "one of " + ", ".join(repr(a) for a in args) + hint_text)
        return value
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise _wrong(where, value, "a section")
        return from_dict(typing.cast("type[Any]", hint), value, where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise _wrong(where, value, "a list")
        return tuple(_convert(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _wrong(where, value, "a section")
        return {key: _convert(args[1], item, _join(where, key)) for key, item in value.items()}
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise _wrong(where, value, _name(hint))
    return value


def _wrong(where: str, value: Any, expected: str) -> ConfigError:
    return ConfigError(f"{where!r} is {value!r}, expected {expected}")


def _name(hint: Any) -> str:
    if typing.get_origin(hint) is tuple:
        return "a list"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text in quotes"}
    return names.get(hint, str(hint))


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value

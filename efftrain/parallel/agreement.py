"""Whether all ranks were started to do the same: compared once, before anything is built."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

import efftrain
from efftrain.errors import ConfigError
from efftrain.parallel.backends import Transport
from efftrain.parallel.layout import Layout

NOTHING = "nothing"
_LENGTH_BYTES = 8


def check_agreement(
    transport: Transport, facts: Mapping[str, str], same: str = "the same recipe, the same --set and the same efftrain"
) -> None:
    """Compare facts of all ranks with those of rank 0.

    One small collective if all agree; a second one finds out who does not and in what.

    Args:
        transport: All ranks.
        facts: What must be equal, by its name.
        same: What all ranks are to be started with, for the message.

    Raises:
        ConfigError: Some rank has others; on all ranks, with the first that has, its rank, expected and found.
    """
    text = json.dumps(dict(sorted(facts.items()))).encode()
    head = len(text).to_bytes(_LENGTH_BYTES, "little") + hashlib.sha256(text).digest()
    heads = _gather(transport, head)
    if len(set(heads)) == 1:
        return
    sizes = [int.from_bytes(other[:_LENGTH_BYTES], "little") for other in heads]
    texts = _gather(transport, text.ljust(max(sizes)))
    found = [json.loads(other[:size]) for other, size in zip(texts, sizes, strict=True)]
    rank = next(rank for rank, other in enumerate(heads) if other != heads[0])
    names = [name for name in sorted({*found[0], *found[rank]}) if found[0].get(name) != found[rank].get(name)]
    expected, other = (facts.get(names[0], NOTHING) for facts in (found[0], found[rank]))
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    raise ConfigError(
        f"rank {rank} was started with {names[0]} = {other}{more}, expected {expected} as on rank 0; "
        f"start all ranks with {same}"
    )


def facts_of_job(plan: object, layout: Layout, **settings: object) -> dict[str, str]:
    """A plan, what it made of the model, and how it is trained, field by field.

    Args:
        plan: A dataclass.
        layout: Of the plan and the model.
        settings: Dataclasses and plain values, by name.
    """
    found = {"efftrain": _version()}
    for name, value in {"plan": plan, **settings}.items():
        if is_dataclass(value):
            found |= {f"{name}.{field.name}": repr(getattr(value, field.name)) for field in fields(value)}
        else:
            found[name] = repr(value)
    found["the layers divided"] = repr(sorted(layout.tensor.styles.items())) if layout.tensor is not None else "none"
    found["the stages"] = repr([cut.names for cut in layout.cuts])
    return found


def facts_of(recipe: Mapping[str, Any]) -> dict[str, str]:
    """A resolved recipe as plain values, key by key, and the code that is to run it."""
    return {**plain(recipe), "efftrain": _version()}


def plain(table: Mapping[str, Any]) -> dict[str, str]:
    """Every value of a table of tables as JSON, by its dotted key."""
    return dict(_flatten(table, ""))


def _version() -> str:
    return f"{efftrain.__version__} ({code_digest()})"


@cache
def code_digest() -> str:
    """Of the package's Python files: a changed checkout keeps its version number."""
    root = Path(efftrain.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _flatten(value: Any, name: str) -> list[tuple[str, str]]:
    if isinstance(value, Mapping):
        return [pair for key, item in value.items() for pair in _flatten(item, f"{name}.{key}" if name else str(key))]
    return [(name, json.dumps(value))]


def _gather(transport: Transport, message: bytes) -> list[bytes]:
    sent = torch.from_numpy(np.frombuffer(message, np.uint8).copy()).to(transport.device)
    return [row.tobytes() for row in transport.all_gather(sent).wait().cpu().numpy()]

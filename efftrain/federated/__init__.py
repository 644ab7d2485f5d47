"""Federated rounds on Flower's Message API, with every uplink through a codec.

Recipes load without Flower and torch; everything else is imported when it is first asked for, and says how to install
Flower where it is missing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from efftrain.federated.recipe import FederatedRecipe

if TYPE_CHECKING:
    from efftrain.federated.grid import InProcessGrid
    from efftrain.federated.rounds import FederatedResult, RoundResult, drive_rounds, run_federated
    from efftrain.federated.uplink import UplinkGrid, uplink_mod

__all__ = [
    "FederatedRecipe",
    "FederatedResult",
    "InProcessGrid",
    "RoundResult",
    "UplinkGrid",
    "drive_rounds",
    "run_federated",
    "uplink_mod",
]

_HOMES = {
    "FederatedResult": "rounds",
    "InProcessGrid": "grid",
    "RoundResult": "rounds",
    "UplinkGrid": "uplink",
    "drive_rounds": "rounds",
    "run_federated": "rounds",
    "uplink_mod": "uplink",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)

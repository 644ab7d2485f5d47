"""Recipes: strict TOML into frozen dataclasses. The dataclasses live beside the code that owns them."""

from efftrain.config.load import check_value, dump_toml, from_dict, load_recipe, to_dict
from efftrain.config.plugin import load_attribute

__all__ = ["check_value", "dump_toml", "from_dict", "load_attribute", "load_recipe", "to_dict"]

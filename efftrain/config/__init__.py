"""Recipes: strict TOML into frozen dataclasses. The dataclasses live beside the code that owns them."""

from efftrain.config.load import dump_toml, from_dict, load_recipe, to_dict

__all__ = ["dump_toml", "from_dict", "load_recipe", "to_dict"]

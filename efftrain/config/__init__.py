"""Recipes: strict TOML into frozen dataclasses."""

"""Every recipe that ships loads strictly, and runs."""

import json
from pathlib import Path

import pytest

from efftrain.config import dump_toml, from_dict, load_recipe, to_dict
from efftrain.data import load_dataset
from efftrain.errors import ConfigError, EfftrainError
from efftrain.parallel import ClusterRecipe
from tests.conftest import ROOT, Run

RECIPES = sorted((ROOT / "parallel" / "recipes").glob("*.toml"))
SMALLER = {"char_lm_topk": ["--set", f"data.options.folder={json.dumps(str(ROOT / 'efftrain' / 'compression'))}"]}
"""Less data, where an epoch of all of it takes minutes."""


def test_there_are_recipes() -> None:
    assert RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_loads_strictly(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(ClusterRecipe, path)
    assert recipe.name == path.stem, "a run folder tells which recipe made it"
    assert from_dict(ClusterRecipe, to_dict(recipe)) == recipe
    (tmp_path / "resolved.toml").write_text(dump_toml(recipe))
    assert load_recipe(ClusterRecipe, tmp_path / "resolved.toml") == recipe
    for section in ("model", "data", "optimizer", "step", "loop", "parallel"):
        with pytest.raises(ConfigError, match=f"unknown key '{section}.nonsense'"):
            load_recipe(ClusterRecipe, path, [f"{section}.nonsense=1"])
    assert f"torchrun --nproc-per-node 2 parallel/train.py parallel/recipes/{path.name}" in path.read_text()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_runs_on_two_workers(path: Path, tmp_path: Path, torchrun: Run) -> None:
    if path.stem.startswith("fashion"):
        try:
            load_dataset("fashion-mnist", "train")
        except EfftrainError as error:
            pytest.skip(str(error))
    less = ["--set", "loop.epochs=1", *SMALLER.get(path.stem, [])]
    arguments = (ROOT / "parallel" / "train.py", path, *less, "--out", tmp_path, "--json")
    ended = torchrun(2, *arguments)
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout)
    assert result["world_size"] == 2
    assert result["num_skipped"] == 0
    assert 0 < result["wire_bytes"] <= result["uncompressed_bytes"]
    recipe = load_recipe(ClusterRecipe, tmp_path / path.stem / "recipe.toml")
    assert recipe.loop.epochs == 1
    assert (tmp_path / path.stem / "model" / "model.safetensors").exists()

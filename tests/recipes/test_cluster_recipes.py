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
WORKERS = {"char_lm_3d": 8, "char_lm_zero_bubble_int8": 4}
SMALLER = {
    "char_lm_topk": [f"data.options.folder={json.dumps(str(ROOT / 'efftrain' / 'compression'))}"],
    "fashion_cnn_fsdp": ["loop.batch_size=512"],
    "char_lm_3d": [f"data.options.folder={json.dumps(str(ROOT / 'efftrain' / 'report'))}"],
    "char_lm_zero_bubble_int8": [f"data.options.folder={json.dumps(str(ROOT / 'efftrain' / 'report'))}"],
    "char_lm_8gpu": [
        f"data.options.folder={json.dumps(str(ROOT / 'efftrain' / 'report'))}",
        "data.options.context=64",
        "model.options={ width = 64, depth = 2, heads = 4, context = 64 }",
    ],
}
"""Less data or a smaller model, where an epoch of all of it takes minutes."""


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
    workers = WORKERS.get(path.stem, 8 if path.stem.endswith("8gpu") else 2)
    assert f"torchrun --nproc-per-node {workers} parallel/train.py parallel/recipes/{path.name}" in path.read_text()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_runs(path: Path, tmp_path: Path, torchrun: Run) -> None:
    if path.stem.startswith("fashion"):
        try:
            load_dataset("fashion-mnist", "train")
        except EfftrainError as error:
            pytest.skip(str(error))
    less = [argument for setting in ("loop.epochs=1", *SMALLER.get(path.stem, [])) for argument in ("--set", setting)]
    arguments = (ROOT / "parallel" / "train.py", path, *less, "--out", tmp_path, "--json")
    workers = WORKERS.get(path.stem, 2)
    ended = torchrun(workers, *arguments)
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout)
    assert result["world_size"] == workers
    assert result["num_skipped"] == 0
    assert 0 < result["wire_bytes"] <= result["uncompressed_bytes"]
    recipe = load_recipe(ClusterRecipe, tmp_path / path.stem / "recipe.toml")
    assert recipe.loop.epochs == 1
    assert (tmp_path / path.stem / "model" / "model.safetensors").exists()

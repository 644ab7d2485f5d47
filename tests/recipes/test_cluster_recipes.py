"""Every recipe that ships loads strictly, and runs."""

import json
from pathlib import Path

import pytest

from efftrain.config import dump_toml, from_dict, load_recipe, to_dict
from efftrain.data import load_dataset
from efftrain.errors import ConfigError, EfftrainError
from efftrain.parallel import ClusterRecipe
from tests.conftest import ROOT, Run
from tests.distributed.conftest import StartRanks
from tests.distributed.jobs import train_recipe

RECIPES = sorted((ROOT / "parallel" / "recipes").glob("*.toml"))
WORKERS = {"char_lm_3d": 8, "char_lm_zero_bubble_int8": 4}
SMALLER = {
    "char_lm_8gpu": ["model.options={ width = 64, depth = 2, heads = 4, context = 64 }", "data.options.context=64"]
}
FEW = """
from efftrain.data import load_dataset


class Few:
    \"\"\"The first samples of a shipped data set: eight batches.\"\"\"

    def __init__(self, split, of, **options):
        self.whole = load_dataset(of, split, **options)

    def __len__(self):
        return min(len(self.whole), 8 * BATCH)

    def batch(self, indices):
        return self.whole.batch(indices)

    def __getattr__(self, name):
        return getattr(self.whole, name)
"""


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
def test_it_runs(path: Path, tmp_path: Path, torchrun: Run, start_ranks: StartRanks) -> None:
    recipe = load_recipe(ClusterRecipe, path)
    try:
        load_dataset(recipe.data.name, "test", **recipe.data.options)
    except EfftrainError as error:
        pytest.skip(str(error))
    (few := tmp_path / "few.py").write_text(FEW.replace("BATCH", str(recipe.loop.batch_size)))
    data = [f"data.name={json.dumps(f'{few}:Few')}", f"data.options.of={json.dumps(recipe.data.name)}"]
    settings = ["loop.epochs=1", *data, *SMALLER.get(path.stem, [])]
    workers = WORKERS.get(path.stem, 2)
    if workers == 2:
        less = [argument for setting in settings for argument in ("--set", setting)]
        ended = torchrun(2, ROOT / "parallel" / "train.py", path, *less, "--out", tmp_path, "--json")
        assert ended.returncode == 0, ended.stderr
        result = json.loads(ended.stdout)
    else:  # a launcher would spend half a minute of two cores on imports
        result = start_ranks(train_recipe, workers, str(path), settings, str(tmp_path)).results()[0]
    assert result["world_size"] == workers
    assert result["num_skipped"] == 0
    assert 0 < result["wire_bytes"] <= result["uncompressed_bytes"]
    recipe = load_recipe(ClusterRecipe, tmp_path / path.stem / "recipe.toml")
    assert recipe.loop.epochs == 1
    assert (tmp_path / path.stem / "model" / "model.safetensors").exists()

"""Every federated recipe that ships loads strictly, and runs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from efftrain.config import dump_toml, from_dict, load_recipe, to_dict
from efftrain.data import load_dataset
from efftrain.errors import ConfigError, EfftrainError
from efftrain.federated import FederatedRecipe, run_federated
from efftrain.federated.attack import attackers
from efftrain.federated.recipe import (
    AttackConfig,
    ClientConfig,
    DataConfig,
    GateConfig,
    ModelConfig,
    RoundsConfig,
    UplinkConfig,
)
from tests.conftest import ROOT, Run

RECIPES = sorted((ROOT / "federated" / "recipes").glob("*.toml"))
SMALLER = {
    "fashion_10000": ["--set", "data.clients=40", "--set", "server.min_replies=1"],
    "fashion_1000": ["--set", "server.cohort=10", "--set", "server.min_replies=1"],
    "fashion_100": ["--set", "data.clients=8", "--set", "data.samples_per_client=50"],
    "fedbuff_mixed_devices": ["--set", "server.evaluate_every=2"],
    "poisoned": ["--set", "data.samples_per_client=30", "--set", "server.cohort=10"],
}


def test_all_are_there() -> None:
    names = {"watch_people", "fashion_100", "fashion_1000", "fashion_10000", "fedbuff_mixed_devices", "poisoned"}
    assert {path.stem for path in RECIPES} == names


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_loads_strictly(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(FederatedRecipe, path)
    assert recipe.name == path.stem, "a run folder tells which recipe made it"
    assert from_dict(FederatedRecipe, json.loads(json.dumps(to_dict(recipe)))) == recipe
    (tmp_path / "resolved.toml").write_text(dump_toml(recipe))
    assert load_recipe(FederatedRecipe, tmp_path / "resolved.toml") == recipe
    for section in ("model", "data", "client", "server", "uplink", "gate", "fleet", "fedbuff", "attack"):
        with pytest.raises(ConfigError, match=f"unknown key '{section}.nonsense'"):
            load_recipe(FederatedRecipe, path, [f"{section}.nonsense=1"])
    assert f"efftrain federate federated/recipes/{path.name}" in path.read_text()
    assert recipe.fleet.devices, "a recipe that ships says what time and energy it would take"


QUICK = ("watch_people", "fashion_10000", "fedbuff_mixed_devices")


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[] if path.stem in QUICK else pytest.mark.slow) for path in RECIPES],
    ids=lambda path: path.stem,
)
def test_it_runs(path: Path, efftrain: Run) -> None:
    if not path.stem.startswith("watch"):
        try:
            load_dataset("fashion-mnist", "test")
        except EfftrainError as error:
            pytest.skip(str(error))
    done = efftrain("federate", path, "--set", "server.rounds=2", *SMALLER.get(path.stem, []), "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["rounds"] == 2
    assert result["virtual_s"] > 0 < result["energy_j"]
    assert result["replies_refused"] == 0


DIGITS = FederatedRecipe(
    model=ModelConfig(name="fashion-cnn", options={"size": 8, "hidden": 32}),
    data=DataConfig(name="digits", partition="iid", clients=20, samples_per_client=70),
    client=ClientConfig(epochs=4, batch_size=10, lr=0.3),
    server=RoundsConfig(rounds=8, cohort=20, evaluate="server", evaluate_every=8),
    uplink=UplinkConfig(codec="Int8()", feedback=False),
    gate=GateConfig(max_update_norm=1e6),
)


@pytest.fixture(scope="module")
def clean() -> float:
    return run_federated(DIGITS).accuracy


@pytest.mark.parametrize(
    ("kind", "least_gap"),
    [
        ("scale", 0.5),
        pytest.param("sign_flip", 0.03, marks=pytest.mark.slow),
        pytest.param("label_flip", -0.02, marks=pytest.mark.slow),
    ],
)
def test_a_robust_strategy_holds_against_what_hurts_the_mean(kind: str, least_gap: float, clean: float) -> None:
    """A fifth attacks. Turned labels hardly hurt the mean of an easy task, so there nothing more is asked."""
    attack = AttackConfig(kind=kind, share=0.2)  # type: ignore[arg-type]
    poisoned = replace(DIGITS, attack=attack)
    assert len(attackers(poisoned)) == 4
    mean = run_federated(poisoned).accuracy
    robust = run_federated(replace(poisoned, server=replace(poisoned.server, strategy="geometric_median"))).accuracy
    assert robust > clean - 0.05
    assert mean < robust - least_gap


def test_alie_is_a_small_step_that_the_gate_and_the_eye_let_pass() -> None:
    poisoned = replace(DIGITS, attack=AttackConfig(kind="alie", share=0.3))
    poisoned = replace(poisoned, server=replace(poisoned.server, rounds=2))
    result = run_federated(poisoned)
    assert result.total("replies_refused") == 0
    assert result.final_sha256 == run_federated(poisoned).final_sha256
    assert result.final_sha256 != run_federated(replace(poisoned, attack=AttackConfig())).final_sha256

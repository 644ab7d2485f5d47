"""Whole runs on the real apps: repeatable, counted, and the same through the ServerApp."""

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from efftrain.config import load_recipe, to_dict
from efftrain.errors import ConfigError, RoundError, ToolError
from efftrain.federated import FederatedRecipe, RoundResult, drive_rounds, run_federated
from efftrain.federated.client_app import app as client_app
from efftrain.federated.flower import ArrayRecord, ConfigRecord, Context, Message, RecordDict, check_version, quiet
from efftrain.federated.grid import InProcessGrid
from efftrain.federated.recipe import (
    ClientConfig,
    DataConfig,
    FleetConfig,
    GateConfig,
    ModelConfig,
    RoundsConfig,
    UplinkConfig,
)
from efftrain.federated.rounds import state_sha256, with_usable_engine
from efftrain.federated.server_app import app as server_app
from efftrain.federated.server_app import recipe_from_run_config

ROOT = Path(__file__).parent.parent.parent
SMALL = FederatedRecipe(
    data=DataConfig(people=(1, 4, 7)), client=ClientConfig(epochs=1), server=RoundsConfig(rounds=2), seed=3
)
TIMES = ("train_s", "round_s", "first_round_s", "wall_s")


def figures(recipe: FederatedRecipe) -> dict[str, object]:
    return {name: value for name, value in run_federated(recipe).to_dict().items() if name not in TIMES}


def test_same_seed_same_bits_another_seed_others() -> None:
    recipe = replace(
        SMALL, server=RoundsConfig(rounds=3, fraction=0.6), uplink=UplinkConfig(codec="Int8(64, 'stochastic')")
    )
    random.seed(1)
    first = figures(recipe)
    random.seed(2)
    again = figures(recipe)
    assert first == again
    assert first["clients_trained"] == 3 * 2
    assert figures(replace(recipe, seed=4))["final_sha256"] != first["final_sha256"]


def test_a_model_that_generated_code_does_not_cover_is_trained_by_torch() -> None:
    torch_run = replace(
        SMALL,
        model=ModelConfig(name="ds-cnn"),  # depthwise layers
        data=DataConfig(name="digits", partition="iid", clients=2, samples_per_client=10),
        server=RoundsConfig(rounds=1, evaluate="server"),
    )
    device_run = replace(torch_run, client=replace(SMALL.client, engine="device"))
    found = run_federated(device_run)
    assert found.to_dict()["engine"] == "torch"
    assert found.final_sha256 == run_federated(torch_run).final_sha256
    assert "depthwise convolution" in with_usable_engine(device_run)[1]
    integers = FleetConfig(devices={"stm32f746": 1.0}, schemes={"stm32f746": "last_k=1"})
    in_integers = replace(device_run, fleet=integers)
    assert with_usable_engine(in_integers) == (in_integers, ""), "nobody trains in fp32"
    mixed = replace(device_run, fleet=replace(integers, devices={"stm32f746": 1.0, "phone_high": 1.0}))
    with pytest.raises(ConfigError, match=r"depthwise.*leave out fleet\.schemes"):
        with_usable_engine(mixed)


def test_the_callers_generators_are_left_alone() -> None:
    random.seed(5)
    torch.manual_seed(5)
    before = random.getstate(), torch.random.get_rng_state()
    run_federated(replace(SMALL, server=RoundsConfig(rounds=1)))
    assert random.getstate() == before[0]
    assert torch.equal(torch.random.get_rng_state(), before[1])


def test_rounds_are_reported_and_counted() -> None:
    seen: list[RoundResult] = []
    result = run_federated(SMALL, on_round=seen.append)
    assert tuple(replace(one, clients=()) for one in seen) == result.rounds
    assert [one.round for one in seen] == [1, 2]
    assert set(seen[0].accuracy_per_person) == {"1", "4", "7"}
    assert seen[1].accuracy == pytest.approx(np.mean(list(seen[1].accuracy_per_person.values())))
    assert seen[0].fp32_uplink_bytes == 3 * 4 * 8471
    codec, num_clients = SMALL.uplink.build(), 3
    payloads = sum(codec.encoded_bytes(tensor.numel()) for tensor in result.state.values())
    names = sum(len(name) for name in result.state)
    both = ("num-examples", "loss", "partition-id")
    metrics = sum(8 + len(name) for name in (*both, *both, "ram-bytes", "accuracy"))
    assert seen[0].uplink_bytes == num_clients * (payloads + names + metrics)
    assert seen[0].downlink_bytes > 2 * 3 * 4 * 8471
    assert result.final_sha256 == state_sha256(result.state)
    assert result.uplink_ratio > 10
    plain = json.loads(json.dumps(result.to_dict()))
    assert plain["accuracy_per_round"] == [one.accuracy for one in seen]
    assert plain["replies_refused"] == plain["clients_dropped"] == 0
    json.dumps(seen[0].to_dict())


def test_training_starts_from_the_model_it_is_given() -> None:
    start = run_federated(SMALL)
    more = run_federated(SMALL, initial=start.state)
    assert more.initial_sha256 == start.final_sha256
    assert more.accuracy_before == start.accuracy


def test_a_wrong_start_is_named() -> None:
    with pytest.raises(ConfigError, match=r"no watch-cnn: tensor 'conv1.bias' has nothing, expected \(16,\)"):
        run_federated(SMALL, initial={"weight": torch.zeros(3)})


def test_server_app_gives_the_same_bits() -> None:
    config = {
        f"{s}.{k}": v for s, section in to_dict(SMALL).items() if isinstance(section, dict) for k, v in section.items()
    }
    flat = {key: json.dumps(value) if isinstance(value, list) else value for key, value in config.items()}
    context = Context(1, 1, {}, RecordDict(), {**flat, "seed": SMALL.seed, "output": ""})
    with quiet():
        server_app(InProcessGrid(client_app, 3), context)
    result = json.loads(str(context.state.config_records["result"]["json"]))
    assert result["final_sha256"] == run_federated(SMALL).final_sha256
    assert result["peak_rss_bytes"] > 50 << 20
    assert set(context.state.array_records["arrays"]) == set(run_federated(SMALL).state)


def test_server_app_goes_on_from_its_journal(tmp_path: Path) -> None:
    config: dict[str, bool | float | int | str] = {
        "data.people": "[1, 4, 7]",
        "client.epochs": 1,
        "seed": 3,
        "journal": str(tmp_path),
        "server.strategy": "fedavgm",
        "server.strategy_options.momentum": 0.5,
    }
    for rounds, resumed_after in ((1, 0), (2, 1)):
        context = Context(1, 1, {}, RecordDict(), {**config, "server.rounds": rounds})
        with quiet():
            server_app(InProcessGrid(client_app, 3), context)
        result = json.loads(str(context.state.config_records["result"]["json"]))
        assert result["resumed_after"] == resumed_after
    options: dict[str, int | float | str | bool] = {"momentum": 0.5}
    whole = replace(SMALL, server=RoundsConfig(rounds=2, strategy="fedavgm", strategy_options=options))
    assert result["final_sha256"] == run_federated(whole).final_sha256


def test_server_app_finds_a_missing_folder_before_its_rounds_and_says_which_are_abandoned(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config: dict[str, bool | float | int | str] = {
        "data.people": "[1, 4]",
        "client.epochs": 1,
        "server.rounds": 1,
        "server.evaluate": "server",
        "gate.max_samples": 1,
    }
    output = str(tmp_path / "nowhere" / "result.json")
    with quiet(), pytest.raises(ConfigError, match=r"is in no folder of the server; make .*nowhere$"):
        server_app(InProcessGrid(client_app, 2), Context(1, 1, {}, RecordDict(), {**config, "output": output}))
    assert "round 1" not in capfd.readouterr().out
    with quiet(), pytest.raises(RoundError, match="the only round was abandoned: round 1, training: 0 of 2 replies"):
        server_app(InProcessGrid(client_app, 2), Context(1, 1, {}, RecordDict(), config))
    assert "ABANDONED: round 1, training: 0 of 2 replies" in capfd.readouterr().out


def test_quorum() -> None:
    strict = replace(SMALL, gate=GateConfig(max_samples=1))
    with pytest.raises(RoundError, match=r"0 of 3 replies were accepted.*num-examples is \d+, expected 1 to 1"):
        run_federated(strict)


def test_too_few_nodes_end_the_wait() -> None:
    recipe = replace(SMALL, server=RoundsConfig(rounds=1, timeout_s=0.3, min_replies=3))
    with pytest.raises(RoundError, match=r"2 of 3 nodes connected within 0\.3 s"):
        drive_rounds(InProcessGrid(client_app, 2), recipe)


def test_diverging_clients_are_dropped_and_the_run_says_so() -> None:
    recipe = replace(SMALL, client=ClientConfig(epochs=1, lr=1e30))
    with np.errstate(all="ignore"), pytest.raises(RoundError, match="local training diverged"):
        run_federated(recipe)


def test_the_recipe_the_app_and_the_defaults_are_one() -> None:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    recipe = load_recipe(FederatedRecipe, ROOT / "federated" / "recipes" / "watch_people.toml")
    assert recipe.fleet.devices == {"esp32_s3": 1.0}
    recipe = replace(recipe, fleet=FleetConfig())  # of simulation only, so no part of the app
    assert recipe == FederatedRecipe(name="watch_people")
    table = tomllib.loads((ROOT / "federated" / "pyproject.toml").read_text())
    config = table["tool"]["flwr"]["app"]["config"]
    flat = {}
    for key, value in config.items():  # as Flower flattens it
        flat.update({f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value})
    assert recipe_from_run_config(flat) == recipe


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"server.round": 3}, "nearest is 'server.rounds'"),
        ({"data.people": "[1, 2"}, "no JSON"),
        ({"data.people": "[1, 1]"}, "none twice"),
        ({"client.lr": 0.0}, "expected a positive number"),
        ({"seed": 2**64}, r"seed is 18446744073709551616, expected 0 to 9223372036854775807"),
        ({"client.threads": 100_000}, r"threads is 100000, expected at most 1024"),
        ({"fleet.workers": 100_000}, r"workers is 100000, expected 1 to 1024"),
        ({"uplink.codec": "TopK(2)"}, "expected a share"),
        ({"model.name": "evil.py:Model"}, "'evil.py:Model' names a file of code, which is run in one process only"),
        ({"data.name": "evil.py:Data", "data.partition": "iid", "data.clients": 8}, "names a file of code"),
        ({"model.name": "evil"}, "expected one of watch-cnn"),
        ({"server.min_replies": 9}, "there are 8 clients"),
        ({"server.min_replies": 8, "server.fraction": 0.5}, r"is 8, but a round takes 4 replies of 8 clients"),
        ({"server.min_replies": 3, "server.cohort": 2}, r"is 3, but a round takes 2 replies of 8 clients"),
        ({"client.scheme": "sparse"}, r"client.engine is 'torch', which trains in fp32 only.* scheme 'sparse'"),
        ({"client.scheme": "sparse", "client.engine": "vmap"}, r"client.engine is 'vmap', which trains in fp32 only"),
        ({"client.engine": "board"}, r'"board", which trains in integers only, but .* scheme "fp32"'),
        (
            {
                "client.engine": "torch",
                "fleet.devices.stm32f746": 1.0,
                "fleet.devices.phone_low": 1.0,
                "fleet.schemes.stm32f746": "sparse",
            },
            r"clients with the scheme 'sparse' \(client.scheme, fleet.schemes\); set client.engine=\"device\"",
        ),
        ({"server": 3, "server.rounds": 2}, r"run config server.rounds: 'server' is given as 3, expected a section"),
        (
            {"data.people": "[1, 2]", "attack.kind": "scale", "attack.share": 0.9},
            r"attack.share 0\.9 of 2 clients leaves nobody honest",
        ),
        (
            {"server.strategy": "krum", "server.strategy_options.num_malicious": 6},
            r"krum with num_malicious=6 needs 2 \* num_malicious \+ 3 = 15 replies, but sees 8 replies at most",
        ),
        (
            {"server.strategy": "bulyan", "server.strategy_options.num_malicious": 1, "server.cohort": 6},
            r"= 7 replies, but sees 6 replies at most",
        ),
        (
            {
                "server.strategy": "multi_krum",
                "server.strategy_options.num_malicious": 2,
                "server.strategy_options.num_selected": 7,
            },
            r"num_selected=7 of 8 replies takes in some of the 2 liars.*at most 6",
        ),
        (
            {
                "server.strategy": "bucketing",
                "server.strategy_options.rule": "krum",
                "server.strategy_options.num_malicious": 1,
            },
            r"krum with num_malicious=1 .* 5 replies, but sees 4 buckets",
        ),
    ],
)
def test_wrong_settings_are_refused(config: dict[str, bool | float | int | str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe_from_run_config(config)


def test_what_no_client_can_do_ends_a_run_before_its_first_round() -> None:
    seen: list[RoundResult] = []
    depthwise = replace(
        SMALL,
        model=ModelConfig(name="ds-cnn"),
        data=DataConfig(name="digits", partition="iid", clients=2, samples_per_client=10),
        client=ClientConfig(engine="vmap"),
    )
    with pytest.raises(ConfigError, match=r"ds-cnn cannot be trained by the vmap engine: its layer"):
        run_federated(depthwise, on_round=seen.append)
    fleet = FleetConfig(devices={"stm32f746": 1.0, "phone_high": 1.0}, schemes={"stm32f746": "sparce"})
    typo = replace(SMALL, client=replace(SMALL.client, engine="device"), fleet=fleet)
    with pytest.raises(ConfigError, match="sparce"):
        run_federated(typo, on_round=seen.append)
    assert not seen


@pytest.mark.parametrize("section", ["model", "data"])
def test_a_client_runs_no_file_that_a_message_names(section: str, tmp_path: Path) -> None:
    ran, file = tmp_path / "ran", tmp_path / "evil.py"
    file.write_text(f"open({str(ran)!r}, 'w')\nModel = Data = None\n")
    changes = {
        "model": {"model": ModelConfig(name=f"{file}:Model")},
        "data": {"data": DataConfig(name=f"{file}:Data", partition="iid", clients=8)},
    }
    recipe = replace(FederatedRecipe(), **changes[section])  # type: ignore[arg-type]
    config = ConfigRecord({"recipe": json.dumps(to_dict(recipe)), "server-round": 1})
    content = RecordDict({"arrays": ArrayRecord({}), "config": config})
    grid = InProcessGrid(client_app, 8)
    for kind in ("train", "evaluate"):
        [reply] = grid.send_and_receive([Message(content, grid.get_node_ids()[0], kind)])
        assert "names a file of code, which is run in one process only" in str(reply.error.reason)
    assert not ran.exists()


@pytest.mark.parametrize("build", [lambda: RoundsConfig(fraction=0), lambda: ModelConfig(name="a")])
def test_sections_check_themselves(build: object) -> None:
    with pytest.raises(ValueError, match="expected"):
        build()  # type: ignore[operator]


def test_version_check() -> None:
    check_version("1.41.3")
    for version in ("1.40.9", "1.42.0", "2.0"):
        with pytest.raises(ToolError, match=r"flwr>=1.41,<1.42.*pip install 'efftrain\[federated\]'"):
            check_version(version)
    with pytest.raises(ToolError, match=r"not installed. Install it: pip install 'efftrain\[federated\]'"):
        check_version(None)


@pytest.mark.parametrize(("setting", "expected"), [(None, "0"), ("1", "1")])
def test_telemetry_stays_off_unless_asked_for(setting: str | None, expected: str) -> None:
    code = (
        "import efftrain.federated, sys; assert 'flwr' not in sys.modules and 'torch' not in sys.modules\n"
        "efftrain.federated.InProcessGrid; import flwr.supercore.telemetry as t; print(t.FLWR_TELEMETRY_ENABLED)"
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith("FLWR_")}
    env |= {} if setting is None else {"FLWR_TELEMETRY_ENABLED": setting}
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=200)
    assert (ran.returncode, ran.stdout.strip()) == (0, expected), ran.stderr


def test_the_readmes_own_app_runs_and_learns(tmp_path: Path) -> None:
    """In a folder of its own. Zero weights would have an error of sum(linspace(-1, 1, 40)**2) = 14."""
    command = [sys.executable, "-W", "error", str(ROOT / "federated" / "own_app.py")]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert ran.returncode == 0, ran.stderr
    error, uplink_bytes = ran.stdout.split()[-2:]
    assert float(error) < 1.4
    assert int(uplink_bytes) > 0

"""Killed at any point and started again, a run ends with the same bits; a damaged journal is refused."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from efftrain.config import dump_toml
from efftrain.errors import CheckpointError
from efftrain.federated import FederatedRecipe, FederatedResult, RoundResult, run_federated
from efftrain.federated.journal import Journal, restore_strategy, strategy_memory
from efftrain.federated.recipe import (
    ClientConfig,
    DataConfig,
    DownlinkConfig,
    FedBuffConfig,
    FleetConfig,
    ModelConfig,
    RoundsConfig,
    UplinkConfig,
)
from efftrain.federated.strategies import build_strategy

SMALL = FederatedRecipe(
    name="small",
    model=ModelConfig(name="fashion-cnn", options={"size": 8, "channels": (2, 4), "hidden": 8}),
    data=DataConfig(name="digits", partition="dirichlet", clients=30, samples_per_client=20),
    client=ClientConfig(epochs=1, batch_size=10),
    server=RoundsConfig(rounds=6, cohort=6, evaluate="server", evaluate_every=2, over_select=True),
    uplink=UplinkConfig(codec="TopK(0.2) >> Int8(block=16)"),
    fleet=FleetConfig(devices={"phone_high": 1.0, "rp2040": 1.0}, drop_out=0.2),
)
ADAM = replace(SMALL, server=replace(SMALL.server, strategy="fedadam", strategy_options={"lr": 0.05}))
BUFFERED = replace(
    SMALL,
    fedbuff=FedBuffConfig(buffer=3, concurrency=8),
    downlink=DownlinkConfig(codec="Int8(16, 'stochastic')"),
)
ROBUST = replace(SMALL, server=replace(SMALL.server, strategy="bucketing"))
SCAFFOLD = replace(
    SMALL, server=replace(SMALL.server, strategy="scaffold"), uplink=UplinkConfig(codec="Int8(16)", feedback=False)
)
RECIPES = {"fedavg": SMALL, "fedadam": ADAM, "fedbuff": BUFFERED, "bucketing": ROBUST, "scaffold": SCAFFOLD}


class Killed(Exception):
    pass


def killed_after(recipe: FederatedRecipe, rounds: int, folder: Path) -> None:
    def stop(result: RoundResult) -> None:
        if result.round > rounds:
            raise Killed

    with pytest.raises(Killed):
        run_federated(recipe, on_round=stop, journal=folder)


def same(one: FederatedResult, two: FederatedResult) -> bool:
    rounds = [[replace(r, train_s=0.0, round_s=0.0) for r in run.rounds] for run in (one, two)]
    return one.final_sha256 == two.final_sha256 and rounds[0] == rounds[1]


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("rounds", [3])
def test_a_resumed_run_ends_as_one_that_never_stopped(name: str, rounds: int, tmp_path: Path) -> None:
    recipe = RECIPES[name]
    expected = run_federated(recipe)
    killed_after(recipe, rounds, tmp_path)
    result = run_federated(recipe, journal=tmp_path)
    assert result.resumed_after == rounds
    assert same(result, expected)
    assert result.accuracy_before == expected.accuracy_before
    again = run_federated(recipe, journal=tmp_path)
    assert again.resumed_after == 6
    assert again.final_sha256 == expected.final_sha256


def test_the_journal_keeps_only_what_it_needs(tmp_path: Path) -> None:
    run_federated(SMALL, journal=tmp_path)
    names = [path.name for path in tmp_path.glob("*.safetensors")]
    assert sorted(name for name in names if name.startswith("round")) == [
        "round-00000005.safetensors",
        "round-00000006.safetensors",
    ]
    clients = [name.split("-")[1] for name in names if name.startswith("client")]
    assert len(clients) == len(set(clients))


def test_a_line_that_was_cut_off_and_files_without_a_line_are_dropped(tmp_path: Path) -> None:
    expected = run_federated(SMALL)
    killed_after(SMALL, 3, tmp_path)
    lines = (tmp_path / "rounds.jsonl").read_bytes()
    (tmp_path / "rounds.jsonl").write_bytes(lines + lines.splitlines()[-1][:200])
    (tmp_path / "round-00000004.safetensors").write_bytes(b"half")
    assert Journal(tmp_path).round == 3
    assert not (tmp_path / "round-00000004.safetensors").exists()
    assert same(run_federated(SMALL, journal=tmp_path), expected)


@pytest.mark.parametrize("which", ["round-00000003", "client-", "rounds.jsonl"])
def test_one_changed_bit_is_refused(which: str, tmp_path: Path) -> None:
    killed_after(SMALL, 3, tmp_path)
    path = next(path for path in sorted(tmp_path.iterdir()) if path.name.startswith(which))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"its checksum does not match, it is damaged"):
        run_federated(SMALL, journal=tmp_path)


def test_another_format_version_is_refused(tmp_path: Path) -> None:
    import hashlib

    killed_after(SMALL, 1, tmp_path)
    line = json.loads((tmp_path / "rounds.jsonl").read_text().partition(" ")[2])
    text = json.dumps({**line, "format_version": 9})
    (tmp_path / "rounds.jsonl").write_text(f"{hashlib.sha256(text.encode()).hexdigest()} {text}\n")
    with pytest.raises(CheckpointError, match="format version 9, expected 1"):
        Journal(tmp_path)


@pytest.mark.parametrize("order", [[0, 1, 1, 2], [0, 2], [1, 2], [1, 0]])
def test_rounds_that_are_not_one_two_three_are_refused(order: list[int], tmp_path: Path) -> None:
    killed_after(SMALL, 3, tmp_path)
    lines = (tmp_path / "rounds.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "rounds.jsonl").write_bytes(b"".join(lines[number] for number in order))
    with pytest.raises(CheckpointError, match=r"line \d is of round \d, expected round \d"):
        Journal(tmp_path)


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    (tmp_path / "journal").rmdir()
    one = run_federated(replace(SMALL, server=replace(SMALL.server, rounds=1))).rounds[0]
    with pytest.raises(CheckpointError, match="could not be written"):
        journal.write(one, {}, {"model/w": np.zeros(2)}, {})


@pytest.mark.parametrize("name", ["fedadam", "fedyogi", "fedavgm", "bucketing", "geometric_median", "fedavg"])
def test_strategies_are_remembered(name: str) -> None:
    one, two = build_strategy(name, {}, seed=1), build_strategy(name, {}, seed=1)
    for attribute, value in (("m_t", {"w": np.ones(3)}), ("momentum_vector", [np.ones(2)])):
        if hasattr(one, attribute):
            setattr(one, attribute, value)
    layout, tensors = strategy_memory(one)
    restore_strategy(two, json.loads(json.dumps(layout)), tensors)
    again = strategy_memory(two)
    assert again[0] == layout
    assert all(np.array_equal(tensor, again[1][key]) for key, tensor in tensors.items())


def kill_and_resume(recipe: FederatedRecipe, folder: Path, times: int, seed: int) -> dict[str, Any]:
    """The command line, SIGKILLed so often at random moments, then left to end."""
    rng = random.Random(seed)
    folder.mkdir()
    (folder / "recipe.toml").write_text(dump_toml(recipe))
    command = [sys.executable, "-m", "efftrain", "federate", "recipe.toml", "--json", "--resume"]
    kills = 0
    while True:
        with subprocess.Popen(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        ) as started:
            if kills < times:
                rounds = folder / "runs" / recipe.name / "journal" / "rounds.jsonl"
                before, end = lines_of(rounds), time.monotonic() + 60
                # After at least one more round, or before: so that the moments cover the start as well as the rounds.
                wanted = before + rng.choice([0, 1, 1, 2])
                while lines_of(rounds) < wanted and started.poll() is None and time.monotonic() < end:
                    time.sleep(0.002)
                time.sleep(rng.uniform(0, 0.15) if wanted > before else rng.uniform(0, 3))
                if started.poll() is None:
                    os.killpg(started.pid, signal.SIGKILL)
                    started.communicate()
                    kills += 1
                    continue
            output, errors = started.communicate(timeout=200)
        assert started.returncode == 0, errors
        assert kills == times, "the run ended before"
        result: dict[str, Any] = json.loads(output)
        return result


def lines_of(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def check_kills(times: int, folder: Path, recipe: FederatedRecipe, seed: int) -> None:
    # Most kills wait for a round or two, so there must be more rounds than kills to have them all.
    rounds = 6 + 2 * times
    longer = replace(recipe, server=replace(recipe.server, rounds=rounds))
    expected = run_federated(longer)
    result = kill_and_resume(longer, folder / "run", times, seed)
    assert result["final_sha256"] == expected.final_sha256
    assert result["accuracy_per_round"] == expected.accuracy_per_round
    rows = [json.loads(line) for line in (folder / "run/runs/small/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "round"] == list(range(1, rounds + 1))
    clients = [json.loads(line) for line in (folder / "run/runs/small/clients.jsonl").read_text().splitlines()]
    assert len(clients) == sum(one.clients_selected for one in expected.rounds)


def test_killed_with_sigkill_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    check_kills(2, tmp_path, SMALL, 0)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", RECIPES)
def test_killed_twenty_times_it_ends_with_the_same_bits(name: str, tmp_path: Path) -> None:
    check_kills(20, tmp_path, RECIPES[name], 1)

"""Workers that are killed, and ranks that were started to do something else."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._C._distributed_c10d import TCPStore

from efftrain.errors import ConfigError, PeerError
from efftrain.parallel import agreement, launched, mesh
from efftrain.parallel.joining import call_roll
from tests.conftest import ROOT
from tests.distributed import jobs
from tests.distributed.conftest import StartRanks
from tests.distributed.test_resume import CODECS, NUM_STEPS, rows_of, write_recipe
from tests.distributed.test_torchrun import descendants

TRAIN = ROOT / "parallel" / "train.py"


# torchrun starts killed workers anew ------------------------------------------------------------------------------


def start(recipe: Path, out: Path, max_restarts: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [f"--max-restarts={max_restarts}", str(TRAIN), str(recipe), "--out", str(out)]
    return subprocess.Popen(
        command,
        env={**os.environ, "TEST_SLEEP_S": "0.01"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_step(run: Path, step: int, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 110
    while not any(row.get("step", 0) >= step for row in _rows(run)):
        assert process.poll() is None, process.communicate()[1][-2000:]
        assert time.monotonic() < deadline, f"step {step} did not come"
        time.sleep(0.002)


def final_state(run: Path) -> dict[str, bytes]:
    """Every file of weights, optimizer, feedback and random numbers."""
    folder = run / "checkpoints" / f"step-{NUM_STEPS:08d}"
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}
    assert len(found) == 3, "what both have, and what each has of its own"
    return found


def _rows(run: Path) -> list[dict[str, Any]]:
    try:
        return rows_of(run)
    except (OSError, ValueError):  # not there yet, or a line half written
        return []


def kill_a_worker(process: "subprocess.Popen[str]", choose: random.Random) -> list[int]:
    """SIGKILL to one of them; returns all processes that were there."""
    family = list(descendants(process.pid))
    assert len(family) == 3, "the agent and two workers"
    os.kill(choose.choice(family[1:]), signal.SIGKILL)
    return family


def recover(folder: Path, whole: Path, recipe: Path, seed: int) -> float:
    """Kill a random worker at a random step; returns the seconds until that step was there again."""
    choose = random.Random(seed)
    step = choose.randint(1, NUM_STEPS - 8)
    process = start(recipe, folder, max_restarts=1)
    try:
        wait_for_step(folder / "r", step, process)
        kill_a_worker(process, choose)
        killed = time.monotonic()
        checkpoint = step // 5 * 5
        # Rows behind the checkpoint are dropped by the resumed run, so they are gone for a moment.
        while process.poll() is None and max((row["step"] for row in _rows(folder / "r")), default=0) > checkpoint:
            time.sleep(0.005)
        while process.poll() is None and max((row["step"] for row in _rows(folder / "r")), default=0) <= step:
            time.sleep(0.005)
        took = time.monotonic() - killed
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors[-2000:]
    finally:
        process.kill()
        process.wait()
    assert [path.name for path in folder.iterdir()] == ["r"], "a restarted worker goes on, it begins no second run"
    assert rows_of(folder / "r") == rows_of(whole)
    assert final_state(folder / "r") == final_state(whole)
    return took


def test_a_killed_worker_comes_back_to_the_same_bits(tmp_path: Path, start_ranks: StartRanks) -> None:
    recipe = write_recipe(tmp_path, *CODECS["correction"])
    start_ranks(jobs.train_recipe, 2, str(recipe), [], str(tmp_path / "whole")).results()
    recover(tmp_path / "killed", tmp_path / "whole" / "r", recipe, seed=0)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_of_twenty_killed_workers_come_back(tmp_path: Path, start_ranks: StartRanks) -> None:
    recipe = write_recipe(tmp_path, *CODECS["correction"])
    start_ranks(jobs.train_recipe, 2, str(recipe), [], str(tmp_path / "whole")).results()
    times = [recover(tmp_path / str(seed), tmp_path / "whole" / "r", recipe, seed) for seed in range(1, 21)]
    print("seconds until the step of the kill was there again:", [round(took, 1) for took in sorted(times)])
    assert max(times) < 15


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_kills_one_after_the_other_under_one_launch(tmp_path: Path, start_ranks: StartRanks) -> None:
    recipe = write_recipe(tmp_path, *CODECS["correction"])
    start_ranks(jobs.train_recipe, 2, str(recipe), [], str(tmp_path / "whole")).results()
    process, choose = start(recipe, tmp_path / "killed", max_restarts=4), random.Random(7)
    try:
        for step in (1, 14, 27, 40):  # the first before there is a checkpoint
            wait_for_step(tmp_path / "killed" / "r", step, process)
            kill_a_worker(process, choose)
            while sum(1 for _ in descendants(process.pid)) == 3:
                time.sleep(0.01)
            time.sleep(2)  # its workers are new ones now, and the rows of the old ones dropped
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors[-2000:]
    finally:
        process.kill()
        process.wait()
    assert rows_of(tmp_path / "killed" / "r") == rows_of(tmp_path / "whole" / "r")
    assert final_state(tmp_path / "killed" / "r") == final_state(tmp_path / "whole" / "r")


# The roll call, in threads ----------------------------------------------------------------------------------------


def together(store: TCPStore, world_size: int, timeout_s: float = 20) -> list[str]:
    names = [""] * world_size

    def join(rank: int) -> None:
        own = TCPStore("127.0.0.1", store.port, world_size, False, timedelta(seconds=20))
        time.sleep(random.random() * 0.05)
        names[rank] = call_roll(own, rank, world_size, timeout_s)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return names


def test_every_start_has_a_name_of_its_own_in_a_store_that_stays() -> None:
    store = TCPStore("127.0.0.1", 0, 1, True, timedelta(seconds=20))
    seen: set[str] = set()
    for world_size in (3, 3, 2, 4, 1):  # restarted, then with one less, then with two more, then alone
        (name,) = set(together(store, world_size))
        assert name not in seen
        seen.add(name)


def test_a_rank_that_does_not_come_is_named() -> None:
    store = TCPStore("127.0.0.1", 0, 1, True, timedelta(seconds=20))
    together(store, 3)  # what it left behind must not stand in for those who are missing now
    with pytest.raises(PeerError, match=r"after 0\.3 s not all 3 ranks have joined; no answer from rank 1, 2: did it"):
        call_roll(store, 0, 3, 0.3)


# Which run is whose -----------------------------------------------------------------------------------------------


def test_a_launch_finds_its_own_run_again(tmp_path: Path) -> None:
    for number, launch in ((1, "a/1"), (2, "b/1"), (3, None)):
        (tmp_path / ("r" if number == 1 else f"r-{number}")).mkdir()
        launched.mark_run(tmp_path, "r", number, launch)
    assert launched.find_run(tmp_path, "r", "a/1") == 1
    assert launched.find_run(tmp_path, "r", "b/1") == 2
    assert launched.find_run(tmp_path, "r", "b/2") is None, "the second thing that its processes do"
    assert launched.find_run(tmp_path, "r", None) is None
    assert launched.find_run(tmp_path / "new", "r", "a/1") is None


# Agreement --------------------------------------------------------------------------------------------------------


@jobs.in_group
def compare(facts: list[dict[str, str]]) -> str:
    try:
        agreement.check_agreement(mesh.transport(torch.device("cpu")), facts[mesh.rank()])
    except ConfigError as error:
        return str(error)
    return "agreed"


def test_ranks_that_were_started_alike_agree(start_ranks: StartRanks) -> None:
    facts = {"optimizer.lr": "0.1", "efftrain": "0.1"}
    assert start_ranks(compare, 2, [facts, dict(reversed(facts.items()))]).results() == ["agreed", "agreed"]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"lr": "0.25", "code": "1"}, "rank 1 was started with lr = 0.25, expected 0.1 as on rank 0; start all"),
        ({"lr": "0.1", "code": "a longer one"}, "rank 1 was started with code = a longer one, expected 1 as on rank 0"),
        ({"lr": "0.1"}, "rank 1 was started with code = nothing, expected 1 as on rank 0"),
        ({"lr": "0", "code": "0", "b": "0"}, "rank 1 was started with b = 0 (and 2 more), expected nothing as on"),
    ],
)
def test_a_rank_that_was_started_otherwise_is_named_by_all(
    start_ranks: StartRanks, other: dict[str, str], said: str
) -> None:
    found = start_ranks(compare, 2, [{"lr": "0.1", "code": "1"}, other]).results()
    assert found[0] == found[1]
    assert found[0].startswith(said)


def test_a_rank_with_another_recipe_ends_the_job_before_it_begins(tmp_path: Path, start_ranks: StartRanks) -> None:
    recipe = write_recipe(tmp_path, *CODECS["correction"])
    found = start_ranks(train_with_own_rate, 2, str(recipe), str(tmp_path / "out")).results()
    assert found[0] == found[1]
    assert found[0].startswith("rank 1 was started with optimizer.lr = 0.2, expected 0.1 as on rank 0; ")
    assert not (tmp_path / "out").exists()


def train_with_own_rate(recipe: str, out: str) -> str:
    try:
        jobs.train_recipe(recipe, [f"optimizer.lr={0.1 * (1 + int(os.environ['RANK']))}"], out)
    except ConfigError as error:
        return str(error)
    return "trained"


def test_facts_hold_every_key_and_the_code() -> None:
    facts = agreement.facts_of({"name": "r", "model": {"name": "n", "options": {"width": 3, "sizes": [1, 2]}}})
    assert list(facts)[:4] == ["name", "model.name", "model.options.width", "model.options.sizes"]
    assert facts["model.options.sizes"] == "[1, 2]"
    assert agreement.code_digest() in facts["efftrain"]

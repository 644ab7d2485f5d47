"""Ranks that are killed, all at once and at any step, and go on as if nothing had been."""

import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.distributed import jobs
from tests.distributed.conftest import Ranks, StartRanks

WORKLOAD = Path(__file__).parent / "workload.py"

CODECS: dict[str, tuple[Any, ...]] = {
    "identity": ("Identity()", False),
    "feedback": ("TopK(0.1)", False),
    "correction": ("TopK(0.1) >> Int8(block=16)", True),
    "entries": ("TopK(0.05) >> Int8(block=16)", True),
    "whole": ("TopK(0.1) >> Int8(block=16)", True, "whole_buckets = true\nmomentum_masking = true\n"),
    "int8": ("Int8(block=32, rounding='stochastic')", False, "algorithm = 'two_phase'\n"),
    "low rank": ("LowRank(2)", False),
}

NUM_STEPS = 3 * (1437 // 66)


def write_recipe(folder: Path, codec: str, correction: bool, more: str = "") -> Path:
    path = folder / "r.toml"
    path.write_text(
        f'name = "r"\nseed = 5\n[model]\nname = "{WORKLOAD}:Net"\n[data]\nname = "{WORKLOAD}:Digits"\n'
        "[optimizer]\nlr = 0.1\nwarmup_steps = 5\n"
        "[loop]\nepochs = 3\nbatch_size = 66\nlog_every = 1\ncheckpoint_every = 5\n"
        f'[parallel]\ncodec = "{codec}"\nmomentum_correction = {str(correction).lower()}\n'
        f"bucket_mb = 0.001\ntimeout_s = 30\n{more}"
    )
    return path


def rows_of(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.endswith("_s")} for row in rows]


def last_checkpoint(run: Path) -> dict[str, bytes]:
    folder = max((run / "checkpoints").iterdir())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.safetensors")}


def wait_for(run: Path, step: int, ranks: Ranks) -> None:
    """Until ``step`` updates are logged."""
    deadline = time.monotonic() + 60
    metrics = run / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < step:
        assert all(process.is_alive() for process in ranks.processes)
        assert time.monotonic() < deadline
        time.sleep(0.001)


def kill_and_resume(
    start_ranks: StartRanks, folder: Path, kind: str, kills: Sequence[int], world_size: int = 2
) -> None:
    recipe = write_recipe(folder, *CODECS[kind])
    whole = start_ranks(jobs.train_recipe, world_size, str(recipe), [], str(folder / "whole")).results()[0]
    assert whole["num_steps"] == NUM_STEPS
    killed = folder / "killed" / "r"
    for step in kills:
        ranks = start_ranks(
            jobs.train_recipe, world_size, str(recipe), [], str(folder / "killed"), killed.exists(), TEST_SLEEP_S="0.01"
        )
        wait_for(killed, step, ranks)
        ranks.kill()
        assert not (killed / "result.json").exists(), "killed too late"
    resumed = start_ranks(jobs.train_recipe, world_size, str(recipe), [], str(folder / "killed"), True).results()[0]
    for figure in ("loss", "accuracy", "num_steps", "wire_bytes", "uncompressed_bytes"):
        assert resumed[figure] == whole[figure], figure
    assert rows_of(killed) == rows_of(folder / "whole" / "r")
    assert last_checkpoint(killed) == last_checkpoint(folder / "whole" / "r")


@pytest.mark.parametrize("kind", CODECS)
def test_a_job_killed_three_times_ends_with_the_same_bits(tmp_path: Path, start_ranks: StartRanks, kind: str) -> None:
    kill_and_resume(start_ranks, tmp_path, kind, sorted(random.Random(kind).sample(range(2, NUM_STEPS - 10), 3)))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", CODECS)
@pytest.mark.parametrize("seed", range(4))
def test_forty_kills(tmp_path: Path, start_ranks: StartRanks, kind: str, seed: int) -> None:
    kills = sorted(random.Random(f"{kind} {seed}").sample(range(1, NUM_STEPS - 10), 10))
    kill_and_resume(start_ranks, tmp_path, kind, kills)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["feedback", "correction", "int8", "low rank"])
def test_three_ranks_resume_to_the_same_bits(tmp_path: Path, start_ranks: StartRanks, kind: str) -> None:
    """Messages are added in rank order. (Identity is left to gloo's ring, whose order depends on DDP's buckets.)"""
    kill_and_resume(start_ranks, tmp_path, kind, [20], world_size=3)


def test_a_rank_that_is_killed_ends_the_others(tmp_path: Path, start_ranks: StartRanks) -> None:
    recipe = write_recipe(tmp_path, *CODECS["correction"])
    ranks = start_ranks(jobs.train_recipe, 2, str(recipe), [], str(tmp_path), TEST_SLEEP_S="0.01")
    wait_for(tmp_path / "r", 5, ranks)
    ranks.processes[1].kill()
    started = time.monotonic()
    with pytest.raises(AssertionError, match=r"PeerError: lost another rank") as error:
        ranks.results(timeout_s=25)
    assert time.monotonic() - started < 20
    assert "gloo/transport" not in str(error.value).splitlines()[-1]


# Another number of ranks


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, start_ranks: StartRanks) -> Path:
    """A run of two ranks, one epoch of three."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = write_recipe(folder, *CODECS["correction"])
    start_ranks(jobs.train_recipe, 2, str(recipe), ["loop.epochs=1"], str(folder)).results()
    return folder


def newest(folder: Path) -> Path:
    return max((folder / "r" / "checkpoints").iterdir())


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_checkpoint_of_two_ranks_loads_on_others(finished: Path, start_ranks: StartRanks, world_size: int) -> None:
    checkpoint = newest(finished)
    arguments = (str(checkpoint.parent), CODECS["correction"][0])
    found = start_ranks(jobs.load_only, world_size, *arguments).results()
    shared = load_file(checkpoint / "state/shared.safetensors")
    old = [load_file(checkpoint / f"rank-{rank}.safetensors") for rank in range(2)]
    for facts in found:
        assert facts["step"] == 1437 // 66
        for name, value in shared.items():
            if name.startswith("model/"):
                np.testing.assert_array_equal(facts["shared"][name], value)
    names = [
        name.removeprefix("exchange/")
        for name in old[0]
        if name.startswith(("exchange/residual/", "exchange/velocity/"))
    ]
    assert {name.split("/")[0] for name in names} == {"residual", "velocity"}
    assert any(np.count_nonzero(old[0][f"exchange/{name}"]) for name in names)
    for name in names:
        parts = [state[f"exchange/{name}"] for state in old]
        if world_size == 1:
            assert found[0]["feedback"] == {}, "one process sends nothing and has no use for it"
        elif world_size == 2:
            for facts, part in zip(found, parts, strict=True):
                np.testing.assert_array_equal(facts["feedback"][name], part)
        else:
            for facts in found:
                np.testing.assert_allclose(facts["feedback"][name], np.mean(parts, axis=0), rtol=1e-6, atol=1e-9)
    if world_size != 2:
        assert len({tuple(facts["random"]) for facts in found}) == world_size, "each rank draws its own numbers"


@pytest.mark.parametrize("steps", [(2, 1), (1, 2)], ids=["two to one", "one to two"])
def test_a_run_goes_on_with_another_number_of_ranks(
    tmp_path: Path, start_ranks: StartRanks, steps: tuple[int, int]
) -> None:
    recipe = write_recipe(tmp_path, *CODECS["correction"])
    results: list[dict[str, Any]] = []
    for world_size, epochs in zip(steps, (1, 3), strict=True):
        ranks = start_ranks(
            jobs.train_recipe, world_size, str(recipe), [f"loop.epochs={epochs}"], str(tmp_path), bool(results)
        )
        results.append(ranks.results()[0])
    assert [result["num_steps"] for result in results] == [NUM_STEPS // 3, NUM_STEPS]
    assert [result["world_size"] for result in results] == list(steps)
    assert results[1]["accuracy"] > max(0.8, results[0]["accuracy"])
    assert [row["step"] for row in rows_of(tmp_path / "r") if row["kind"] == "step"] == list(range(1, NUM_STEPS + 1))


def test_a_checkpoint_that_one_rank_cannot_write_ends_all(tmp_path: Path, start_ranks: StartRanks) -> None:
    """The file of rank 1 is in the way of a folder; rank 0 could write, and must not believe that all is well."""
    found = start_ranks(jobs.save_where_rank_1_cannot, 2, str(tmp_path)).results()
    assert found[0].startswith("CheckpointError")
    assert "1 other ranks could not write their part" in found[0]
    assert found[1].startswith("CheckpointError")
    assert "could not be written" in found[1]
    assert list(tmp_path.glob("*")) == [tmp_path / "step-00000001"], "the older one is whole, nothing else is left"

"""Checkpoints under another plan: weights and optimizer go on exactly, feedback by the stated rule."""

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from efftrain.errors import CheckpointError
from efftrain.training import Job
from efftrain.training.checkpoint import complete_checkpoints, load_checkpoint, load_model
from tests.distributed import grid_jobs
from tests.distributed.conftest import StartRanks

STEPS = 2
ROUTES: dict[str, list[tuple[int, dict[str, Any]]]] = {
    "four, two, four ranks": [(4, {"exchange": "gradsync"}), (2, {}), (4, {"shard": "full"})],
    "data to data x tensor": [(4, {"shard": "full"}), (4, {"tensor": 2})],
    "tensor to pipeline": [(2, {"tensor": 2}), (2, {"pipeline": 2, "schedule": "zbv"})],
    "pipeline to one process": [(4, {"pipeline": 2, "shard": "full"}), (1, {})],
    "one process to three axes": [(1, {}), (8, {"tensor": 2, "pipeline": 2})],
    "a parameter in two stages": [
        (2, {"pipeline": 2, "tied": True}),
        (1, {"tied": True}),
        (4, {"pipeline": 2, "tied": True}),
    ],
    "parameters in no stage": [
        (2, {"pipeline": 2, "unused": True}),
        (1, {"unused": True}),
        (4, {"pipeline": 2, "shard": "full", "unused": True}),
        (4, {"pipeline": 2, "schedule": "zbv", "codec": "TopK(1.0)", "unused": True}),
    ],
}


@pytest.mark.parametrize("name", ROUTES)
def test_any_plan_goes_on_where_another_stopped(name: str, start_ranks: StartRanks, tmp_path: Path) -> None:
    route = ROUTES[name]
    kind = grid_jobs.kind_of(route[0][1])
    expected = grid_jobs.one_process(STEPS * len(route), **kind)
    found: list[float] = []
    for world_size, settings in route:
        ranks = start_ranks(grid_jobs.train_and_save, world_size, settings, str(tmp_path), STEPS).results()
        assert {facts["first"] for facts in ranks} == {len(found)}
        found += ranks[0]["losses"]
    assert found == pytest.approx(expected["losses"], abs=2e-6)
    whole = grid_jobs.model(**kind)
    load_model(complete_checkpoints(tmp_path)[-1], whole)
    reference = Job(grid_jobs.model(**kind), optimizer=grid_jobs.OPTIMIZER)
    for step in range(STEPS * len(route)):
        reference.step(*grid_jobs.batch(step))
    for (key, value), wanted in zip(whole.state_dict().items(), reference.model.state_dict().values(), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=2e-6, msg=key)


@pytest.mark.parametrize("before", [(1, {}), (4, {})], ids=["other world", "other axes"])
def test_ranks_of_a_replica_draw_alike_under_another_plan(
    before: tuple[int, dict[str, Any]], start_ranks: StartRanks, tmp_path: Path
) -> None:
    """A tensor axis whose ranks drop out different units computes no function at all."""
    start_ranks(grid_jobs.train_and_save, *before, str(tmp_path), 1).results()
    ranks = start_ranks(grid_jobs.train_and_save, 4, {"tensor": 2}, str(tmp_path), 1).results()
    draws = {replica: {facts["draw"] for facts in ranks if facts["replica"] == replica} for replica in (0, 1)}
    assert [len(found) for found in draws.values()] == [1, 1]
    assert draws[0] != draws[1]


@pytest.mark.parametrize(
    "settings", [{"codec": "TopK(0.1)"}, {"shard": "full"}, {"pipeline": 2, "schedule": "zbv"}], ids=str
)
def test_a_checkpoint_in_the_background_is_the_same(
    settings: dict[str, Any], start_ranks: StartRanks, tmp_path: Path
) -> None:
    for background in (False, True):
        folder = str(tmp_path / str(background))
        start_ranks(grid_jobs.train_and_save, 2, settings, folder, STEPS, background).results()
    now, later = (
        {path.relative_to(folder): load_file(path) for path in folder.rglob("*.safetensors")}
        for folder in (tmp_path / "False", tmp_path / "True")
    )
    torch.testing.assert_close(now, later, rtol=0, atol=0)
    assert len(now) >= 3


@pytest.mark.parametrize(
    ("world_size", "settings"),
    [
        (2, {"shard": "full", "codec": "RandomK(0.2)"}),
        (4, {"pipeline": 2, "schedule": "zbv", "codec": "TopK(0.1) >> Int8()"}),
        (4, {"tensor": 2, "codec": "Int8()"}),
    ],
    ids=str,
)
def test_a_run_that_was_stopped_ends_with_the_same_bits(
    world_size: int, settings: dict[str, Any], start_ranks: StartRanks, tmp_path: Path
) -> None:
    for folder, parts in (("whole", [4]), ("parts", [3, 1])):
        for num_steps in parts:
            start_ranks(grid_jobs.train_and_save, world_size, settings, str(tmp_path / folder), num_steps).results()
    whole, stopped = (
        {path.name: load_file(path) for path in complete_checkpoints(tmp_path / folder)[-1].rglob("*.safetensors")}
        for folder in ("whole", "parts")
    )
    assert len(whole) == 2 * world_size, "weights and feedback of each rank"
    torch.testing.assert_close(whole, stopped, rtol=0, atol=0)


def test_feedback_goes_from_pipeline_to_pipeline(start_ranks: StartRanks, tmp_path: Path) -> None:
    codec = {"codec": "TopK(0.1)"}
    pipeline = {**codec, "pipeline": 2, "schedule": "zbv"}
    first = start_ranks(grid_jobs.train_and_save, 4, pipeline, str(tmp_path), STEPS).results()
    # The same residuals, dealt out anew: 0 further steps save what was loaded.
    for settings in ({**codec, "pipeline": 2, "schedule": "1f1b"}, codec | {"exchange": "gradsync", "data": 2}):
        world_size = 4 if "pipeline" in settings else 2
        again = start_ranks(grid_jobs.train_and_save, world_size, settings, str(tmp_path), 0).results()
        before, after = (sum(facts["owed"] ** 2 for facts in ranks) for ranks in (first, again))
        assert before > 0
        assert after == pytest.approx(before, rel=1e-5)  # norms of fp32 in other groups


def test_feedback_of_another_tensor_axis_is_forgotten_with_a_warning(start_ranks: StartRanks, tmp_path: Path) -> None:
    start_ranks(grid_jobs.train_and_save, 2, {"codec": "TopK(0.1)"}, str(tmp_path), STEPS).results()
    found = start_ranks(grid_jobs.train_and_save, 4, {"codec": "TopK(0.1)", "tensor": 2}, str(tmp_path), 0).results()
    assert all(facts["restored"] and facts["owed"] == 0 for facts in found)
    assert all(any("forgotten" in text for text in facts["warnings"]) for facts in found)


@pytest.fixture(scope="module")
def sharded(start_ranks: StartRanks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    start_ranks(grid_jobs.train_and_save, 2, {"shard": "full"}, str(folder), 1).results()
    return folder


def test_a_damaged_shard_is_refused(sharded: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(sharded, folder)
    shards = sorted((complete_checkpoints(folder)[-1] / "state").iterdir())
    assert len(shards) == 2
    for shard, position in itertools.product(shards, (0, 9, -1)):
        data = shard.read_bytes()
        changed = bytearray(data)
        changed[position] ^= 1
        shard.write_bytes(changed)
        with pytest.raises(CheckpointError, match=r"it is damaged\. Delete the folder to use an older checkpoint"):
            load_checkpoint(folder, Job(grid_jobs.model(), optimizer=grid_jobs.OPTIMIZER), seed=0)
        shard.write_bytes(data)
    shards[1].unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(folder, Job(grid_jobs.model(), optimizer=grid_jobs.OPTIMIZER), seed=0)


def test_there_is_no_pickle(sharded: Path) -> None:
    files = [path for path in sharded.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json"}

"""Models as users write them, under plans: the same as on one process, or one line that says what to change."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from safetensors.torch import load_model as load_safetensors
from torch import nn

from efftrain.compression import Int8
from efftrain.errors import CheckpointError
from efftrain.training import Job
from efftrain.training.checkpoint import complete_checkpoints, load_checkpoint, load_model
from tests.distributed import grid_jobs, own_jobs
from tests.distributed.conftest import StartRanks


def test_layers_that_share_a_weight_go_on_under_any_plan(start_ranks: StartRanks, tmp_path: Path) -> None:
    route = [(1, {}), (2, {"pipeline": 2}), (2, {"shard": "full"}), (1, {}), (2, {}), (2, {"pipeline": 2})]
    found: list[float] = []
    for world_size, settings in route:
        ranks = start_ranks(own_jobs.go_on, world_size, settings, str(tmp_path), 2).results()
        assert {facts["first"] for facts in ranks} == {len(found)}
        found += ranks[0]["losses"]
        names = {name for path in complete_checkpoints(tmp_path)[-1].glob("state/*") for name in load_file(path)}
        assert {name for name in names if name.startswith("model/")} == {
            "model/embedding.weight", "model/layer.weight", "model/layer.bias"
        }  # fmt: skip
    assert found == pytest.approx(own_jobs.losses_of(own_jobs.tied(), len(found)), abs=2e-6)
    whole = own_jobs.tied()
    load_model(complete_checkpoints(tmp_path)[-1], whole)
    assert whole.head.weight is whole.embedding.weight
    assert not torch.equal(whole.head.weight, own_jobs.tied().head.weight)


@pytest.mark.parametrize(("first", "then"), [("tied", "untied"), ("untied", "tied")])
def test_a_weight_that_is_shared_in_one_of_two_models_is_named(first: str, then: str, tmp_path: Path) -> None:
    def job(kind: str) -> Job:
        model = own_jobs.tied()
        if kind == "untied":
            model.head.weight = nn.Parameter(model.embedding.weight.detach().clone())
        return Job(model, optimizer=own_jobs.OPTIMIZER)

    job(first).save(tmp_path)
    with pytest.raises(CheckpointError, match=r"tensor 'head\.weight': expected .*, found .*; is it of another model"):
        load_checkpoint(tmp_path, job(then), seed=0)


def test_a_model_on_another_device_is_refused(start_ranks: StartRanks) -> None:
    for rank, message in enumerate(start_ranks(own_jobs.apply_elsewhere, 2).results()):
        assert message.startswith(f"rank {rank}: the model is on meta, the ranks exchange on cpu; move it there")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ([{}, {}], "applied"),
        (
            [{"lr": 0.1}, {"lr": 0.2}],
            "rank 1 was started with optimizer.lr = 0.2, expected 0.1 as on rank 0; start all",
        ),
        ([{"codec": Int8()}, {"codec": Int8(block=8)}], "rank 1 was started with plan.codec = Int8(block=8, "),
        ([{}, {"pipeline": 2}], "rank 1 was started with plan.pipeline = 2 (and 1 more), expected 1 as on rank 0; "),
        (
            [{"pipeline": 2, "schedule": "gpipe"}, {"pipeline": 2, "schedule": "1f1b"}],
            "rank 1 was started with plan.schedule = '1f1b', expected 'gpipe' as on rank 0; start all ranks with the "
            "same plan, the same settings and the same efftrain",
        ),
    ],
)
def test_ranks_of_a_script_that_were_given_something_else_are_refused(
    settings: list[dict[str, Any]], said: str, start_ranks: StartRanks
) -> None:
    found = start_ranks(own_jobs.apply_something_else, 2, settings).results()
    assert len(set(found)) == 1, "all ranks say the same"
    assert found[0].startswith(said)


def test_blocks_inside_of_blocks_are_sharded(start_ranks: StartRanks) -> None:
    for losses in start_ranks(own_jobs.sharded_in_each_other, 2).results():
        assert losses == pytest.approx(own_jobs.losses_of(own_jobs.nested(), 3), abs=2e-6)


def test_frozen_layers_in_a_pipeline(start_ranks: StartRanks) -> None:
    for losses in start_ranks(own_jobs.frozen_in_a_pipeline, 2).results():
        assert losses == pytest.approx(own_jobs.losses_of(own_jobs.frozen(), 3), abs=2e-6)


def test_a_stage_computes_its_blocks_again_and_leaves_other_weights_to_others(start_ranks: StartRanks) -> None:
    once, twice = (
        start_ranks(own_jobs.recompute_in_a_pipeline, 2, settings).results()
        for settings in ({}, {"checkpointing": "full"})
    )
    for losses, _, _ in once + twice:
        assert losses == pytest.approx(own_jobs.losses_of(own_jobs.sequential(), 3), abs=2e-6)
    for ranks in (once, twice):
        held = [name for _, here, _ in ranks for name in here]
        assert sorted(held) == sorted(name for name, _ in own_jobs.sequential().named_parameters()), "each on one rank"
    calls = [sum(calls for _, _, calls in ranks) for ranks in (once, twice)]
    assert calls == [2 * 4, 2 * 2 * 4], "micro-batches, blocks"


@pytest.mark.parametrize(("settings", "pieces"), [({}, 2), ({"pipeline": 2, "microbatches": 4}, 4)])
def test_one_rank_warns_of_batch_norm(settings: dict[str, Any], pieces: int, start_ranks: StartRanks) -> None:
    first, other = start_ranks(own_jobs.batch_norm_in, 2, settings).results()
    assert len(first) == 1
    assert f"BatchNorm1d '1' normalizes each of the {pieces} pieces of a batch" in first[0]
    assert other == []


@pytest.mark.parametrize(
    ("world_size", "settings"),
    [
        (1, {"model": "tied"}),
        (2, {"model": "tied"}),
        (2, {"model": "tied", "pipeline": 2}),
        (2, {"model": "tied", "shard": "full"}),
        (2, {"model": "transformer", "tensor": 2}),
        (4, {"model": "transformer", "pipeline": 2, "schedule": "zbv", "shard": "grads"}),
    ],
    ids=str,
)
def test_any_plan_exports_the_whole_model(
    world_size: int, settings: dict[str, Any], start_ranks: StartRanks, tmp_path: Path
) -> None:
    path = tmp_path / "new" / "model.safetensors"
    kept = start_ranks(own_jobs.export, world_size, settings, str(path)).results()
    assert kept[0] == ["model.safetensors"]
    if settings["model"] == "tied":
        found, expected, batch = own_jobs.tied(), own_jobs.tied(), own_jobs.tokens
    else:
        found, expected, batch = grid_jobs.model(), grid_jobs.model(), grid_jobs.batch  # type: ignore[assignment]
    job = Job(expected, optimizer=grid_jobs.OPTIMIZER)
    for step in range(2):
        job.step(*batch(step))
    assert not any(load_safetensors(found, path)), "nothing is missing, nothing is left"
    for name, value in found.state_dict().items():
        torch.testing.assert_close(value, expected.state_dict()[name], rtol=1e-4, atol=2e-6, msg=name)


def test_a_lost_rank_is_told_with_the_axis(start_ranks: StartRanks) -> None:
    with pytest.raises(AssertionError) as error:
        start_ranks(own_jobs.leave_the_data_axis, 4).results(timeout_s=40)
    said = "PeerError: lost another rank of the data axis (ranks 2, 3), or waited too long for it, on rank 2; see its"
    assert said in str(error.value)

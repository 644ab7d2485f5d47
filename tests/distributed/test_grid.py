"""Every combination of axes, exchanges, schedules and codecs: the gradient of one process, or refused by name."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from efftrain.parallel.pipeline import SCHEDULES, SPLIT_BACKWARD
from tests.distributed import grid_jobs
from tests.distributed.conftest import StartRanks

Settings = dict[str, Any]

EXCHANGES: tuple[Settings, ...] = ({"exchange": "ddp"}, {"exchange": "gradsync"}, {"shard": "full"}, {"shard": "grads"})
CODECS = ("Identity()", "Int8()", "TopK(0.1)")
PARAMETERS = {name for name, _ in grid_jobs.model().named_parameters()}


def grid(world_size: int) -> list[Settings]:
    """All cells with axes of one or two ranks that make up so many."""
    found = []
    for tensor, pipeline in itertools.product((1, 2), (1, 2)):
        if world_size // (tensor * pipeline) in (1, 2) and world_size % (tensor * pipeline) == 0:
            schedules = SCHEDULES if pipeline == 2 else ("1f1b",)
            for schedule, exchange, codec in itertools.product(schedules, EXCHANGES, CODECS):
                found.append({"tensor": tensor, "pipeline": pipeline, "schedule": schedule, "codec": codec, **exchange})
    return found


def why_refused(cell: Settings) -> str | None:
    """The sentence that must be in the refusal; nothing else may be refused."""
    if cell.get("exchange") == "ddp":
        if cell["codec"] != "Identity()":
            return "DDP carries no codec"
        if cell["tensor"] > 1 or cell["pipeline"] > 1:
            return "take exchange=gradsync"
    if cell.get("shard") == "full" and cell["pipeline"] > 1 and cell["schedule"] in SPLIT_BACKWARD:
        return "left without gradients"
    return None


def check(cell: Settings, ranks: Sequence[Mapping[str, Any]], world_size: int) -> None:
    reason = why_refused(cell)
    if reason is not None:
        assert all(reason in facts["refused"] for facts in ranks), cell
        return
    names = PARAMETERS - {"head.weight"} if cell.get("tied") else PARAMETERS
    assert set().union(*(facts["names"] for facts in ranks)) == names, cell
    # One process compares with fp32 sums in another order; an entry that is wrong is off by its own size.
    exact = cell["codec"] == "Identity()" or world_size == cell["tensor"] * cell["pipeline"]
    for facts in ranks:
        if exact:
            assert facts["error"] < 1e-6, cell
            assert facts["losses"] < 1e-6, cell
            assert facts["norms"] < 1e-6, cell
        elif "shard" in cell:  # residuals are of shards, which tests of compress_fsdp add up
            assert facts["error"] < (0.01 if cell["codec"] == "Int8()" else 0.2), cell
            assert 0 < facts["losses"] < 2e-3, cell
        else:
            # What travelled and what is kept for later make up the gradient, to the rounding of Int8's stochastic part.
            assert facts["with_residuals"] < 1e-6, cell
            assert facts["error"] > 1e-4, f"{cell}: nothing was compressed"


def run(start_ranks: StartRanks, world_size: int, plans: list[Settings]) -> None:
    for first in range(0, len(plans), 12):
        some = plans[first : first + 12]
        ranks = start_ranks(grid_jobs.cells, world_size, some).results(timeout_s=200)
        for i, cell in enumerate(some):
            check(cell, [facts[i] for facts in ranks], world_size)


def representative(world_size: int) -> list[Settings]:
    """Without a codec all; with one the cells in which torch's own exchange would be wrong."""
    plain = [cell for cell in grid(world_size) if cell["codec"] == "Identity()" and cell.get("shard") != "grads"]
    coded = [
        cell
        for cell in grid(world_size)
        if cell["codec"] == "TopK(0.1)" and cell["schedule"] in ("zbv", "1f1b") and cell.get("exchange") == "gradsync"
    ]
    return plain + coded


def test_two_ranks(start_ranks: StartRanks) -> None:
    run(start_ranks, 2, [cell for cell in representative(2) if why_refused(cell) is None])


def test_four_ranks(start_ranks: StartRanks) -> None:
    chosen = [
        cell
        for cell in representative(4)
        if why_refused(cell) is None and cell["schedule"] in ("1f1b", "zbv") and cell.get("shard") != "grads"
    ]
    run(start_ranks, 4, chosen)


def test_eight_ranks(start_ranks: StartRanks) -> None:
    axes: Settings = {"tensor": 2, "pipeline": 2}
    run(
        start_ranks,
        8,
        [
            {**axes, "schedule": "zbv", "exchange": "gradsync", "codec": "TopK(0.1)"},
            {**axes, "schedule": "1f1b", "shard": "full", "codec": "Identity()"},
        ],
    )


def test_gathered_weights_under_a_split_backward_pass(start_ranks: StartRanks) -> None:
    cell: Settings = {"tensor": 1, "pipeline": 2, "shard": "grads", "codec": "Identity()"}
    plans: list[Settings] = [{**cell, "schedule": schedule} for schedule in SPLIT_BACKWARD]
    run(start_ranks, 4, [*plans, {**cell, "schedule": "zbv", "codec": "TopK(0.1)"}])


def test_a_parameter_in_two_stages(start_ranks: StartRanks) -> None:
    """On ranks of their own its gradients are added up; schedules in the shape of a V have both on one rank."""
    tied: Settings = {"tied": True, "tensor": 1, "pipeline": 2, "codec": "Identity()"}
    run(start_ranks, 2, [{**tied, "schedule": schedule} for schedule in SCHEDULES])
    run(
        start_ranks,
        4,
        [
            {**tied, "schedule": "1f1b"},
            {**tied, "schedule": "zbv"},
            {**tied, "schedule": "zbv", "codec": "TopK(0.1)"},
            {**tied, "schedule": "1f1b", "pipeline": 4, "microbatches": 4},
        ],
    )


def test_nodes_beside_other_axes(start_ranks: StartRanks) -> None:
    """Two replicas of a tensor axis of two in a node of four ranks, or two replicas of one stage in a node of two."""
    coded: Settings = {"tensor": 1, "pipeline": 1, "exchange": "gradsync", "codec": "TopK(0.1)"}
    run(
        start_ranks,
        8,
        [
            {**coded, "tensor": 2, "node_size": 4},
            {**coded, "tensor": 2, "node_size": 2},  # a node has one replica: nothing is summed up inside
            {**coded, "pipeline": 2, "schedule": "1f1b", "microbatches": 2, "node_size": 2},
            {**coded, "tensor": 2, "pipeline": 2, "schedule": "zbv", "node_size": 4},
        ],
    )


def test_cells_that_torch_gets_wrong_are_refused_without_ranks() -> None:
    from efftrain.errors import ConfigError

    refused = [cell for cell in grid(2) + grid(4) + grid(8) if why_refused(cell) is not None]
    assert len(refused) > 20
    for cell in refused:
        with pytest.raises(ConfigError, match=str(why_refused(cell))):
            grid_jobs.plan_of(cell)


def test_sequence_parallel(start_ranks: StartRanks) -> None:
    plain: Settings = {"tensor": 2, "sequence": True, "codec": "Identity()", "exchange": "gradsync", "pipeline": 1}
    run(start_ranks, 4, [plain, {**plain, "pipeline": 2, "schedule": "zbv"}])


def test_sharded_groups_with_copies(start_ranks: StartRanks) -> None:
    cell: Settings = {"tensor": 1, "pipeline": 1, "codec": "Identity()", "shard": "full", "shard_size": 2}
    run(start_ranks, 4, [cell, {**cell, "shard": "grads"}])


def test_recomputed_activations(start_ranks: StartRanks) -> None:
    full: Settings = {"tensor": 1, "pipeline": 1, "codec": "Identity()", "checkpointing": "full"}
    plans: list[Settings] = [
        {**full, "shard": "full"},
        {**full, "tensor": 2, "exchange": "gradsync"},
        {**full, "pipeline": 2, "schedule": "interleaved_1f1b", "exchange": "gradsync"},
        {**full, "pipeline": 2, "schedule": "1f1b", "exchange": "gradsync", "checkpointing": "selective"},
    ]
    run(start_ranks, 2, plans)


def test_bf16(start_ranks: StartRanks) -> None:
    bf16: Settings = {"precision": "bf16", "codec": "Identity()"}
    plans: list[Settings] = [
        {**bf16, "tensor": 2},
        {**bf16, "shard": "full"},
        {**bf16, "pipeline": 2, "schedule": "1f1b"},
        {**bf16, "pipeline": 2, "schedule": "zbv"},
    ]
    for found in start_ranks(grid_jobs.cells, 2, plans).results():
        for plan, facts in zip(plans, found, strict=True):
            # A bf16 product has 8 bits; gradients and weights stay fp32.
            assert facts["error"] < 0.02, plan
            assert 0 < facts["losses"] < 0.01, plan


@pytest.mark.parametrize("label", [300, -5])
def test_a_label_of_no_class_is_refused_where_classes_are_divided(start_ranks: StartRanks, label: int) -> None:
    for found in start_ranks(grid_jobs.label_out_of_range, 2, {"tensor": 2}, label).results():
        assert found.startswith("labels run from ")
        assert "expected labels from 0 to 31" in found


def test_a_weight_that_one_of_its_stages_gives_no_gradient_stays_one(start_ranks: StartRanks) -> None:
    [alone] = start_ranks(grid_jobs.detached, 1, {}, 3).results()
    ranks = start_ranks(grid_jobs.detached, 4, {"data": 2, "pipeline": 2, "schedule": "1f1b"}, 3).results()
    for found in ranks:
        for name, value in found.items():
            assert value == pytest.approx(alone[name], abs=1e-4), name
    assert len({found["emb.weight"] for found in ranks}) == 1


def test_float8(start_ranks: StartRanks) -> None:
    float8: Settings = {"precision": "float8", "codec": "Identity()"}
    plans: list[Settings] = [
        {**float8, "exchange": "gradsync"},
        {**float8, "exchange": "ddp", "checkpointing": "full"},
        {**float8, "shard": "full"},
    ]
    for found in start_ranks(grid_jobs.cells, 2, plans).results():
        for plan, facts in zip(plans, found, strict=True):
            # A product has 4 bits forward and 3 back.
            assert 0.01 < facts["error"] < 0.2, plan
            assert 0 < facts["losses"] < 0.1, plan


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_compiled_blocks(start_ranks: StartRanks) -> None:
    compiled: Settings = {"codec": "Identity()", "compile": True}
    plans: list[Settings] = [
        {**compiled, "exchange": "gradsync"},
        {**compiled, "shard": "full", "checkpointing": "selective"},
        {**compiled, "tensor": 2},
        {**compiled, "pipeline": 2, "schedule": "1f1b"},
    ]
    for found in start_ranks(grid_jobs.cells, 2, plans).results(timeout_s=500):
        for plan, facts in zip(plans, found, strict=True):
            assert facts["error"] < 1e-5, plan  # sums in another order
            assert facts["losses"] < 1e-5, plan


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_the_whole_grid(start_ranks: StartRanks, world_size: int) -> None:
    run(start_ranks, world_size, grid(world_size))

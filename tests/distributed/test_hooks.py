"""Scripts that keep torch's own wrappers, with our codecs inside."""

from typing import Any

import numpy as np
import pytest

from tests.distributed import hook_jobs
from tests.distributed.conftest import StartRanks


def largest_difference(a: dict[str, Any], b: dict[str, Any]) -> float:
    return max(float(np.abs(a[name] - b[name]).max()) for name in a)


@pytest.mark.parametrize("codec", ["TopK(0.1)", "Int8(block=32)", "LowRank(2)"])
def test_the_ddp_hook_is_the_plans_exchange(start_ranks: StartRanks, codec: str) -> None:
    """DDP rebuilds its buckets after the first step; residuals are kept by parameter, so weights agree."""
    first, second = start_ranks(hook_jobs.ddp, 2, codec).results()
    assert first["digest"] == second["digest"]
    assert largest_difference(first["weights"], first["plan"]) < 1e-6
    assert any(name.startswith("residual/") for name in first["owed"])
    assert first["stats"]["wire_bytes"] > 0


def test_low_rank_in_many_buckets_does_not_hang(start_ranks: StartRanks) -> None:
    ranks = start_ranks(hook_jobs.ddp, 3, "LowRank(2)", 100).results()
    assert len({facts["digest"] for facts in ranks}) == 1


def test_nan_reaches_all_ranks_of_a_ddp_script(start_ranks: StartRanks) -> None:
    for facts in start_ranks(hook_jobs.ddp, 2, "TopK(0.1)", 6, 2).results():
        assert facts["nans"] == [2]
        assert all(np.isfinite(value).all() for value in facts["weights"].values())


@pytest.mark.parametrize("world_size", [2, 3])
def test_fsdp_with_everything_sent_is_plain_fsdp(start_ranks: StartRanks, world_size: int) -> None:
    ranks = start_ranks(hook_jobs.fsdp, world_size, "TopK(1.0)").results()
    assert largest_difference(ranks[0]["coded"]["weights"], ranks[0]["plain"]["weights"]) < 1e-6


def test_fsdp_sends_fewer_bytes_and_learns(start_ranks: StartRanks) -> None:
    first, second = start_ranks(hook_jobs.fsdp, 2, "Int8(block=32)").results()
    assert largest_difference(first["coded"]["weights"], second["coded"]["weights"]) == 0
    difference = largest_difference(first["coded"]["weights"], first["plain"]["weights"])
    assert 0 < difference < 0.02, "8 bits with feedback stay near fp32 for a few steps"
    num_elements = sum(value.size for value in first["plain"]["weights"].values())
    sent = first["coded"]["stats"]["wire_bytes"] / hook_jobs.NUM_STEPS
    assert sent < 1.3 * num_elements / 2, "half of the shards, a byte an element"
    assert first["owed"] == ["num_steps", "residual/(root)", "residual/features"]


def test_nan_reaches_the_norm_of_an_fsdp_script(start_ranks: StartRanks) -> None:
    for facts in start_ranks(hook_jobs.fsdp, 2, "TopK(0.1)", 2).results():
        assert facts["coded"]["nans"] == [2]
        assert all(np.isfinite(value).all() for value in facts["coded"]["weights"].values())


def test_what_the_doors_do_not_take(start_ranks: StartRanks) -> None:
    for identity, unsharded, matrices in start_ranks(hook_jobs.refused, 2).results():
        assert "leave the hook out" in identity
        assert "call fully_shard before" in unsharded
        assert "cannot encode the shards" in matrices

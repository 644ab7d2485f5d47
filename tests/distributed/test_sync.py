"""The exchange itself: every codec on 2 to 8 ranks, nothing lost between them, and forms that must agree."""

from typing import Any, Literal, TypeAlias

import numpy as np
import pytest

from efftrain.training import OptimizerConfig
from tests.distributed import sync_jobs
from tests.distributed.conftest import StartRanks

CASES = [
    ("TopK(0.2)", "gather"),
    ("TopK(0.2)", "two_phase"),
    ("TopK(0.2) >> Int8(block=4)", "two_phase"),
    ("Int8(block=8)", "two_phase"),
    ("Int8(block=8)", "gather"),
    ("RandomK(0.3)", "two_phase"),
    ("Threshold(0.2)", "two_phase"),
    ("Sign(block=8)", "two_phase"),
    ("LowRank(1)", "low_rank"),
]


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(("codec", "algorithm"), CASES)
def test_nothing_is_lost_between_ranks(start_ranks: StartRanks, codec: str, algorithm: str, world_size: int) -> None:
    """What all gave and owed before is what all received and owe now; the mean is the same on all ranks."""
    check_nothing_lost(start_ranks(sync_jobs.exchange_by_hand, world_size, codec, algorithm).results(), codec)


@pytest.mark.parametrize("algorithm", ["gather", "two_phase"])
def test_nothing_is_lost_between_nodes(start_ranks: StartRanks, algorithm: str) -> None:
    ranks = start_ranks(sync_jobs.exchange_by_hand, 4, "TopK(0.2) >> Int8(block=4)", algorithm, 3, 2).results()
    check_nothing_lost(ranks, "TopK")
    for i in range(len(sync_jobs.SHAPES)):
        held = [ranks[rank][-1]["after"].get(f"residual/p{i}", np.zeros(1)) != 0 for rank in range(2)]
        assert not (held[0] & held[1]).any(), "one rank of a node is in charge of an element"


def check_nothing_lost(ranks: list[list[dict[str, Any]]], codec: str) -> None:
    world_size = len(ranks)
    sent_something = False
    for step in range(len(ranks[0])):
        facts = [rank[step] for rank in ranks]
        for i in range(len(sync_jobs.SHAPES)):
            name = f"residual/p{i}"
            gave = sum(fact["in"][i].astype(np.float64) + fact["before"].get(name, 0.0) for fact in facts)
            owe = sum(np.asarray(fact["after"].get(name, 0.0), np.float64) for fact in facts)
            mean = facts[0]["out"][i]
            for fact in facts[1:]:
                np.testing.assert_array_equal(fact["out"][i], mean)
            np.testing.assert_allclose(world_size * mean.astype(np.float64) + owe, gave, atol=2e-5)
            sent_something |= bool(np.any(owe))
    assert sent_something, f"{codec} left nothing unsent: the test would not see a loss"


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_codec_keeps_replicas_equal(start_ranks: StartRanks, world_size: int) -> None:
    """In several buckets, so that exchanges of two collectives overlap."""
    check_many_steps(start_ranks(sync_jobs.many_steps, world_size, 12, 0.001).results())


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_every_codec_for_a_thousand_steps(start_ranks: StartRanks, world_size: int) -> None:
    check_many_steps(start_ranks(sync_jobs.many_steps, world_size, 1000, 0.001).results(timeout_s=1500))


def check_many_steps(ranks: list[dict[str, Any]]) -> None:
    for codec, first in ranks[0].items():
        assert first["skipped"] == 0
        assert np.isfinite(first["losses"]).all(), codec
        for other in ranks[1:]:
            assert other[codec]["digest"] == first["digest"], codec


@pytest.fixture(scope="module")
def four(start_ranks: StartRanks) -> list[dict[str, Any]]:
    """The facts of four ranks; see ``sync_jobs.variants``."""
    return start_ranks(sync_jobs.variants, 4).results()


def largest_difference(a: dict[str, Any], b: dict[str, Any]) -> float:
    return max(float(np.abs(a["weights"][name] - b["weights"][name]).max()) for name in a["weights"])


def test_sending_all_is_sending_plainly_in_every_form(four: list[dict[str, Any]]) -> None:
    for form in ("all gathered", "all in two phases", "all in nodes", "all in whole buckets"):
        assert largest_difference(four[0][form], four[0]["identity"]) < 2e-6, form


def test_two_phases_send_less_on_four_ranks(four: list[dict[str, Any]]) -> None:
    gathered, phased = (four[0][form]["stats"][0]["wire_bytes"] for form in ("gather", "two_phase"))
    assert phased < gathered


def test_replicas_are_equal_in_every_form(four: list[dict[str, Any]]) -> None:
    for form, facts in four[0].items():
        assert {other[form]["digest"] for other in four} == {facts["digest"]}, form


@pytest.mark.parametrize("form", ["nodes", "whole", "two_phase", "low rank"])
def test_nan_on_one_rank_costs_all_that_step(four: list[dict[str, Any]], form: str) -> None:
    for facts in four:
        assert [i for i, skipped in enumerate(facts[f"{form} nan"]["skipped"]) if skipped] == [3]
        assert facts[f"{form} nan"]["harmed"] == []
        assert facts[f"{form} nan"]["digest"] == facts[f"{form} left out"]["digest"]


def test_warm_up_sends_more_first(four: list[dict[str, Any]]) -> None:
    sent = [stats["wire_bytes"] for stats in four[0]["warm-up"]["stats"]]
    assert sent[0] > sent[2] > sent[4] == sent[-1]


def test_masking_and_clipping_change_what_is_sent(four: list[dict[str, Any]]) -> None:
    velocities = four[0]["masking"]["feedback"]
    assert any((value == 0).any() for name, value in velocities.items() if name.startswith("velocity/"))
    assert largest_difference(four[0]["clipping"], four[0]["identity"]) > 1e-3


def test_what_is_wrong_is_said_before_anything_is_sent(start_ranks: StartRanks) -> None:
    found = start_ranks(sync_jobs.refusals, 2).results()
    for facts in found:
        assert facts["nodes of three"].startswith("ConfigError: nodes of 3 ranks do not divide 2 ranks")
        assert "has other parameters than that of rank" in facts["other model"]
        assert facts["whole matrices"].startswith("ConfigError: LowRank(")
        assert facts["whole matrices"].endswith("sends matrices one by one, leave out whole_buckets")
        assert facts["right"] == "accepted"


def test_a_replica_that_went_astray_is_found(start_ranks: StartRanks) -> None:
    for message in start_ranks(sync_jobs.replica_that_went_astray, 3).results():
        assert message.startswith(
            "ReplicaError: the weights of rank 1 of the data axis differ from those of the other 2"
        )


def test_a_parameter_without_gradient_on_a_rank_counts_as_zero(start_ranks: StartRanks) -> None:
    first, second = start_ranks(sync_jobs.unused_parameter, 2).results()
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name])
    np.testing.assert_array_equal(first["b.bias"], np.full(4, 1.0))  # 2 samples on one of 2 ranks
    assert first.keys() == {"a.weight", "a.bias", "b.weight", "b.bias"}, "that of c is on no rank"


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_parameters_without_gradients_are_those_of_one_process(
    start_ranks: StartRanks, optimizer: Literal["adamw", "sgd"]
) -> None:
    """Weight decay and momentum move what has a gradient of zeros, and leave alone what has none."""
    config = OptimizerConfig(name=optimizer, lr=0.1, weight_decay=0.1, schedule="constant")
    first, second = start_ranks(sync_jobs.branches, 2, config).results()
    for name, facts in first.items():
        pieces = name[-1]
        expected = first[f"one process, {pieces}"]
        assert facts["some"] == expected["some"] == [True, True, False, True, False, True], name
        assert not any(facts["never"]), name
        lossless = name.startswith(("ddp", "gradsync", "all entries"))
        for parameter, value in facts["weights"].items():
            np.testing.assert_array_equal(value, second[name]["weights"][parameter])
            if lossless or parameter.startswith("never"):
                np.testing.assert_allclose(value, expected["weights"][parameter], atol=2e-6, err_msg=name)
        if lossless:
            np.testing.assert_allclose(facts["losses"], expected["losses"], rtol=1e-5, err_msg=name)
            np.testing.assert_allclose(facts["norms"], expected["norms"], rtol=1e-5, err_msg=name)
        if name.startswith(("sparse", "low rank")):
            owed = facts["owed"]
            assert not any(value.any() for state in owed for key, value in state.items() if "never" in key), name
            assert any(value.any() for value in owed[1].values()), name
            for before, after in ((1, 2), (3, 4)):  # no rank has a gradient in steps 2 and 4: nothing is sent or lost
                assert owed[before].keys() == owed[after].keys()
                for key, value in owed[before].items():
                    np.testing.assert_array_equal(value, owed[after][key], err_msg=f"{name}: {key}")


def test_divided_weights_refuse_a_gradient_on_some_ranks_only(start_ranks: StartRanks) -> None:
    for message in start_ranks(sync_jobs.divided_branches, 2).results():
        assert message == (
            "ConfigError: some.weight has a gradient on 1 of 2 ranks of the data axis; divided weights need the same "
            "layers in use on all ranks: take shard=none"
        )


Layout: TypeAlias = tuple[int, int, bool]
"""Ranks, ranks of a node, whole buckets."""

LAYOUTS: list[tuple[Layout, Layout]] = [
    ((4, 1, False), (4, 2, False)),
    ((4, 2, False), (2, 1, False)),
    ((2, 1, False), (4, 2, False)),
    ((2, 1, False), (2, 1, True)),
    ((2, 1, True), (2, 1, True)),
    ((4, 2, True), (2, 1, False)),
    ((2, 1, True), (4, 2, True)),
]


@pytest.mark.parametrize(("before", "after"), LAYOUTS)
def test_what_is_owed_survives_another_layout(start_ranks: StartRanks, before: Layout, after: Layout) -> None:
    """The mean that is still owed stays. The buckets are other ones in any case."""
    states = [found[0] for found in start_ranks(sync_jobs.state_of, *before, 3).results()]
    loaded = start_ranks(sync_jobs.state_loaded, after[0], states, *after[1:]).results()
    names = {name for state in states for name in state if name.startswith("residual/")}
    assert len(names) == 6, "those of every parameter"
    for name in names:
        owed = sum(state[name].astype(np.float64) for state in states if name in state) / before[0]
        now = sum(state[name].astype(np.float64) for state in loaded if name in state) / after[0]
        assert np.any(owed)
        np.testing.assert_allclose(now, owed, atol=1e-6)

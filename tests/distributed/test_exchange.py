"""Two gloo ranks, step by step: what is averaged, what is sent, and what a bad gradient may not do."""

from typing import Any

import numpy as np
import pytest

from efftrain.compression import Feedback, parse_codec
from tests.distributed import jobs
from tests.distributed.conftest import StartRanks

Facts = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def ranks(start_ranks: StartRanks) -> list[Facts]:
    """The facts of both ranks; see ``jobs.all_facts``."""
    return start_ranks(jobs.all_facts, 2).results()


@pytest.fixture(scope="module")
def facts(ranks: list[Facts]) -> Facts:
    """The facts of rank 0."""
    return ranks[0]


def largest_difference(a: dict[str, Any], b: dict[str, Any]) -> float:
    assert a["weights"].keys() == b["weights"].keys()
    return max(float(np.abs(a["weights"][name] - b["weights"][name]).max()) for name in a["weights"])


def test_identity_is_plain_ddp_to_the_bit(facts: Facts) -> None:
    assert facts["identity"]["digest"] == facts["ddp"]["digest"]


def test_two_ranks_are_one_process_with_the_whole_batch(facts: Facts) -> None:
    assert largest_difference(facts["identity"], facts["one"]) < 1e-6
    assert facts["identity"]["losses"] == pytest.approx(facts["one"]["losses"], rel=1e-6)


def test_sending_all_is_sending_plainly(facts: Facts) -> None:
    assert largest_difference(facts["all"], facts["identity"]) < 1e-6
    assert all(np.count_nonzero(value) == 0 for value in facts["all"]["feedback"].values())


def test_means_of_few_entries_stay_sparse(facts: Facts) -> None:
    """Where the optimizer behind the exchange is plain SGD: momentum is corrected in front of it."""
    few = [size for size in facts["entries"]["sizes"].values() if 8 * 2 * max(1, round(0.05 * size)) <= size]
    assert facts["entries"]["num_sparse"] == len(few) == 5, "all but the bias of 10 elements"
    for kind in ("top-k", "corrected", "all", "identity"):
        assert facts[kind]["num_sparse"] == 0, kind


@pytest.mark.parametrize("kind", ["top-k", "corrected", "entries"])
def test_top_k_is_the_papers_algorithm(facts: Facts, kind: str) -> None:
    """Feedback and momentum correction against NumPy in float64; a tie broken otherwise would move a weight by 1e-3."""
    assert largest_difference(facts[kind], facts[f"{kind} by hand"]) < 1e-6
    assert largest_difference(facts[kind], facts["identity"]) > 1e-3, "and it does compress"


def test_feedback_keeps_no_memory_of_the_callers() -> None:
    """DDP fills its buckets anew in every step; a velocity that points into one would change by itself."""
    feedback, gradient = Feedback(parse_codec("TopK(0.1)"), momentum=0.9), np.ones(20, np.float32)
    feedback.encode("w", gradient)
    feedback.commit()
    gradient[:] = 7
    np.testing.assert_array_equal(feedback.state_dict()["velocity/w"], np.ones(20))


def test_momentum_correction_is_another_algorithm(facts: Facts) -> None:
    assert largest_difference(facts["corrected"], facts["top-k"]) > 1e-3
    assert {name.split("/")[0] for name in facts["corrected"]["feedback"]} == {"residual", "velocity"}
    assert {name.split("/")[0] for name in facts["top-k"]["feedback"]} == {"residual"}


def test_replicas_are_equal_to_the_bit(ranks: list[Facts]) -> None:
    for name, fact in ranks[0].items():
        if "digest" in fact:
            assert fact["digest"] == ranks[1][name]["digest"], name
        if "losses" in fact:
            np.testing.assert_array_equal(fact["losses"], ranks[1][name].get("losses", fact["losses"]))


def test_three_replicas_are_equal_to_the_bit(start_ranks: StartRanks) -> None:
    """Of three numbers the order of adding counts, so every rank must add in the same one."""
    first, *others = start_ranks(jobs.digests_of_codecs, 3).results()
    assert others == [first, first]


def test_each_rank_owes_its_own(ranks: list[Facts]) -> None:
    for name, value in ranks[0]["sparse"]["feedback"].items():
        if value.size > 1:
            assert not np.array_equal(value, ranks[1]["sparse"]["feedback"][name]), name


def test_buckets_do_not_matter(facts: Facts) -> None:
    """Residuals belong to parameters, so no bit changes."""
    few, many = facts["sparse"], facts["sparse small buckets"]
    assert len(set(few["buckets"])) == 1
    assert len(set(many["buckets"])) > 2, "the test needs several buckets"
    assert few["digest"] == many["digest"]
    for name, value in few["feedback"].items():
        np.testing.assert_array_equal(value, many["feedback"][name])


@pytest.mark.parametrize(
    ("kind", "codec"),
    [
        ("all", "TopK(1.0)"),
        ("int8", "Int8(block=32, rounding='stochastic')"),
        ("top-k", "TopK(0.1)"),
        ("sparse", "TopK(0.1) >> Int8(block=16)"),
        ("sparse small buckets", "TopK(0.1) >> Int8(block=16)"),
        ("sparse micro", "TopK(0.1) >> Int8(block=16)"),
    ],
)
def test_bytes_on_the_wire_are_those_of_the_payloads(facts: Facts, kind: str, codec: str) -> None:
    """One payload a parameter to one other rank, each step once, however many micro-batches.

    Of its header only the checksum travels; a bucket has a byte of health.
    """
    sizes, chosen = facts[kind]["sizes"], parse_codec(codec)
    payloads = [bytes(chosen.encode(np.ones(size, np.float32))) for size in sizes.values()]
    num_bytes = sum(len(payload) - 18 - payload[5] + 4 for payload in payloads) + len(set(facts[kind]["buckets"]))
    # Two ranks: a ring all-reduce sends half of the gradient in each of its two rounds.
    expected = {"wire_bytes": num_bytes, "uncompressed_bytes": 4 * sum(sizes.values())}
    assert facts[kind]["stats"] == [expected] * jobs.NUM_STEPS


def test_an_uncompressed_run_sends_what_it_says(facts: Facts) -> None:
    num_bytes = 4 * sum(facts["identity"]["sizes"].values())
    for kind in ("identity", "identity micro"):
        assert facts[kind]["stats"] == [{"wire_bytes": num_bytes, "uncompressed_bytes": num_bytes}] * jobs.NUM_STEPS


def test_micro_batches_send_once_a_step(facts: Facts) -> None:
    assert len(facts["sparse micro"]["buckets"]) == len(facts["sparse"]["buckets"]) == jobs.NUM_STEPS
    assert largest_difference(facts["identity micro"], facts["identity"]) < 2e-6
    # A sum in another order may swap two nearly equal entries; the first step has no such pair.
    assert facts["sparse micro"]["losses"][:2] == pytest.approx(facts["sparse"]["losses"][:2], rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "without", "step"),
    [
        ("identity nan", "identity left out", 3),
        ("sparse nan", "sparse left out", 3),
        ("entries nan", "entries left out", 3),
        ("identity bad gradient", "identity left out", 3),
        ("sparse bad gradient", "sparse left out", 3),
        ("nan in step 0", "left out 0", 0),
    ],
)
def test_nan_on_one_rank_costs_all_that_step_and_nothing_else(
    ranks: list[Facts], kind: str, without: str, step: int
) -> None:
    for facts in ranks:
        assert [i for i, skipped in enumerate(facts[kind]["skipped"]) if skipped] == [step]
        assert facts[kind]["harmed"] == [], "weights, optimizer, residuals and velocities are as before"
        assert facts[kind]["digest"] == facts[without]["digest"], "as if the batch had never been"
        for name, value in facts[kind]["feedback"].items():
            np.testing.assert_array_equal(value, facts[without]["feedback"][name])


def test_nan_does_not_reach_running_statistics(ranks: list[Facts]) -> None:
    for facts in ranks:
        assert sum(facts["norm nan"]["skipped"]) == 1
        assert facts["norm nan"]["harmed"] == []


def test_all_ranks_give_up_together(ranks: list[Facts]) -> None:
    for facts in ranks:
        assert facts["endless nan"]["step"] == 19
        assert facts["endless nan"]["error"].startswith("NonFiniteError: loss or gradient was inf or NaN in 20 steps")


def test_all_ranks_evaluate_one_model(ranks: list[Facts]) -> None:
    """Running statistics differ between the ranks after a step; what is evaluated and saved is rank 0's."""
    first, second = (facts["statistics"] for facts in ranks)
    assert first["buffers"] == second["buffers"]
    assert first["found"] == second["found"]
    assert first["found"] == pytest.approx(first["whole"], rel=1e-6)
    assert second["found"] == pytest.approx(second["whole"], rel=1e-6)

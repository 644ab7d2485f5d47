"""What codecs tell the gradient exchange: fitted to a tensor, for the second phase, during the warm-up."""

from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from efftrain.compression import (
    Codec,
    Identity,
    Int8,
    LowRank,
    RandomK,
    Sign,
    Threshold,
    TopK,
    orthonormalize,
    start_factor,
)
from efftrain.compression.sparsify import Sparse
from efftrain.compression.spec import CODECS
from efftrain.compression.wire import pack, unpack
from efftrain.errors import PayloadError

SPARSE: list[type[Sparse]] = [TopK, RandomK, Threshold]


def ratios() -> st.SearchStrategy[float]:
    return st.floats(1e-6, 1)


@pytest.mark.parametrize("codec", [Identity(), Int8(block=7), Sign()])
def test_dense_codecs_are_the_same_everywhere(codec: Codec) -> None:
    assert codec.for_tensor((3, 4)) == codec.second_phase() == codec.warmed_up(0.0) == codec
    assert not codec.shared_key


@given(st.lists(st.integers(0, 12), max_size=3), st.integers(0, 200), ratios())
def test_top_k_decides_once_for_all_pieces(shape: list[int], dense_below: int, ratio: float) -> None:
    codec = TopK(ratio, Int8(), dense_below)
    fitted, n = codec.for_tensor(tuple(shape)), int(np.prod(shape, dtype=int))
    assert fitted.num_sent(n) == codec.num_sent(n)
    assert fitted == replace(fitted, dense_below=0, values=Int8())
    # A piece of a tensor that is sent whole is sent whole, and one of a large tensor is not, however small it is.
    assert fitted.num_sent(n // 2) == (n // 2 if n < dense_below else TopK(ratio).num_sent(n // 2))


@pytest.mark.parametrize("codec", SPARSE)
@given(ratio=ratios())
def test_the_second_phase_has_room_for_the_union_of_two(codec: type[Sparse], ratio: float) -> None:
    first = codec(ratio=ratio) >> Int8(block=5)  # type: ignore[call-arg]
    second = first.second_phase()
    assert second.ratio == (ratio if codec is RandomK else min(1, 2 * ratio))
    assert replace(second, ratio=ratio) == first  # type: ignore[call-arg]


def test_random_places_of_all_ranks_and_both_phases_are_one() -> None:
    assert [codec for codec in CODECS if codec.shared_key] == [RandomK, LowRank]
    codec, rng = RandomK(0.1), np.random.default_rng(0)
    gradients = rng.standard_normal((3, 1000)).astype(np.float32)
    total = sum(codec.decode(codec.encode(g, key=5)) for g in gradients)
    second = codec.second_phase()
    np.testing.assert_array_equal(second.decode(second.encode(total, key=5)), total)


@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        ((16, 8, 3, 3), 16),
        ((100, 40), 100),
        ((8, 3), 8),  # the factors have 22 elements, the matrix 24
        ((7, 3), 7),  # 20 against 21
        ((4, 4), 0),  # 16 against 16
        ((1000,), 0),
        ((1, 1000), 0),
        ((1000, 1), 0),
        ((0, 5), 0),
        ((), 0),
    ],
)
def test_low_rank_is_for_matrices_larger_than_their_factors(shape: tuple[int, ...], rows: int) -> None:
    fitted = LowRank(2).for_tensor(shape)
    assert fitted == (LowRank(2, rows=rows) if rows else Identity())
    n = int(np.prod(shape, dtype=int))
    assert fitted.encoded_bytes(n) <= Identity().encoded_bytes(n) + 6
    if isinstance(fitted, LowRank):
        assert fitted.matrix_shape(n) == (rows, n // rows)
        assert fitted.encoded_bytes(n) < Identity().encoded_bytes(n) + 6


def test_low_rank_of_another_size_is_refused() -> None:
    codec = LowRank(rows=10)
    with pytest.raises(ValueError, match="LowRank is fitted to 10 rows, 33 elements are no multiple"):
        codec.encode(np.ones(33, np.float32))
    data = codec.encode(np.ones(50, np.float32)).data.copy()
    parts = unpack(data)
    with pytest.raises(PayloadError, match="10 rows and 51 elements"):
        codec.decode(pack(parts.codec_id, parts.params, 51, [parts.body]))


def test_a_layer_whose_first_gradient_is_zero_is_sent_later() -> None:
    """Its warm-started iteration goes on where one from zeros would give zeros for ever."""
    m, q = np.zeros((12, 30), np.float32), start_factor(30, 3, key=4)
    for step in range(3):
        p = m @ q
        orthonormalize(p)
        q = m.T @ p
        if step == 0:
            assert not q.any()
            m = (np.random.default_rng(0).standard_normal((12, 3)) @ np.ones((3, 30))).astype(np.float32)
            m += start_factor(12, 1, key=1) @ start_factor(30, 1, key=2).T
    np.testing.assert_allclose(p @ q.T, m, atol=1e-5)


@pytest.mark.parametrize("codec", SPARSE)
@given(ratio=ratios())
def test_the_warm_up_falls_to_the_ratio_in_few_stages(codec: type[Sparse], ratio: float) -> None:
    final = codec(ratio=ratio) >> Int8()  # type: ignore[call-arg]
    stages = [final.warmed_up(step / 1000) for step in range(1001)]
    sent = [stage.ratio for stage in stages]
    assert sent == sorted(sent, reverse=True)
    assert sent[0] == max(0.25, ratio)
    assert stages[-1] == final == final.warmed_up(7.0)
    assert len(set(sent)) <= 6
    assert all(replace(stage, ratio=ratio) == final for stage in stages)  # type: ignore[call-arg]


def test_the_warm_up_is_that_of_the_paper() -> None:
    """Sparsity of 75 %, 93.75 %, 98.4375 % and 99.6 % in the four epochs before 99.9 %."""
    sent = [TopK(0.001).warmed_up(epoch / 4).ratio for epoch in range(5)]
    assert sent == [1 - 0.75, 1 - 0.9375, 1 - 0.984375, 1 - 0.99609375, 0.001]


@pytest.mark.parametrize("codec", [Identity(), TopK()])
@pytest.mark.parametrize("progress", [-0.1, float("nan")])
def test_a_progress_that_is_none_is_refused(codec: Codec, progress: float) -> None:
    with pytest.raises(ValueError, match="progress of the warm-up is"):
        codec.warmed_up(progress)

"""Low rank against NumPy's singular value decomposition, the best of all approximations of a rank."""

import itertools

import numpy as np
import numpy.typing as npt
import pytest

from efftrain.compression import Feedback, LowRank, orthonormalize, start_factor

Floats = npt.NDArray[np.float32]


def matrix(rows: int, cols: int, decay: float, seed: int = 0) -> Floats:
    """Random directions, singular values ``1, decay, decay**2, ...``."""
    rng, size = np.random.default_rng(seed), min(rows, cols)
    left, right = (np.linalg.qr(rng.standard_normal((n, size)))[0] for n in (rows, cols))
    m: Floats = ((left * decay ** np.arange(size)) @ right.T).astype(np.float32)
    return m


def best_error(m: Floats, rank: int) -> float:
    return float(np.linalg.norm(np.linalg.svd(m.astype(np.float64), compute_uv=False)[rank:]))


@pytest.mark.parametrize("rank", [1, 2, 5])
@pytest.mark.parametrize("shape", [(30, 40), (200, 16), (12, 900)])
@pytest.mark.parametrize("exponent", [-60, 0, 60])
def test_a_matrix_of_the_rank_comes_back(shape: tuple[int, int], rank: int, exponent: int) -> None:
    rng = np.random.default_rng(rank)
    m = rng.standard_normal((shape[0], rank)) @ rng.standard_normal((rank, shape[1]))
    m = np.ldexp(m, exponent).astype(np.float32)
    codec = LowRank(rank, rows=shape[0])
    y = codec.decode(codec.encode(m.reshape(-1), key=3)).reshape(shape)
    # Rounding of m, p, q and of sums of at most 900 products in fp32.
    assert np.linalg.norm(np.ldexp(y - m, -exponent)) <= 1e-6 * np.linalg.norm(np.ldexp(m, -exponent))


@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("decay", [0.5, 0.9])
def test_warm_started_iterations_come_near_the_best(rank: int, decay: float) -> None:
    m = matrix(60, 80, decay)
    q, best, errors = start_factor(80, rank, key=1), best_error(m, rank), []
    for _ in range(30):
        p = m @ q
        orthonormalize(p)
        q = m.T @ p
        errors.append(float(np.linalg.norm(m - p @ q.T)))
    assert all(later <= earlier * (1 + 1e-4) for earlier, later in itertools.pairwise(errors))
    assert best * (1 - 1e-4) <= errors[-1] <= 1.01 * best


@pytest.mark.parametrize("decay", [0.5, 0.9, 1.0])
def test_one_message_comes_near_the_best(decay: float) -> None:
    """Mostly; now and then the random start of just ``rank`` columns misses much of a direction that matters."""
    codec, m = LowRank(4, rows=60), matrix(60, 80, decay).reshape(-1)
    best, errors = best_error(m.reshape(60, 80), 4), []
    for key in range(20):
        errors.append(float(np.linalg.norm(codec.decode(codec.encode(m, key=key)) - m)))
    assert min(errors) >= best * (1 - 1e-4)
    assert np.median(errors) <= 1.1 * best
    assert max(errors) <= 2.5 * best


def test_feedback_sends_all_directions_in_time() -> None:
    """A constant gradient of full rank: what arrives on average is the gradient."""
    m = matrix(20, 30, 0.9).reshape(-1)
    feedback, arrived = Feedback(LowRank(2, rows=20)), np.zeros_like(m)
    for step in range(200):
        arrived += feedback.codec.decode(feedback.encode("w", m, key=step)) if feedback.codec else 0
        feedback.commit()
    assert np.linalg.norm(arrived / 200 - m) <= 0.1 * np.linalg.norm(m)
    np.testing.assert_allclose(arrived + feedback.state_dict()["residual/w"], 200 * m, atol=1e-4)


def test_start_is_nearly_normal() -> None:
    f = start_factor(50_000, 2, key=9)
    assert np.abs(f.mean(axis=0)).max() < 6 / np.sqrt(50_000)
    np.testing.assert_allclose(f.std(axis=0), 1, atol=0.02)
    assert abs(float(np.mean(f[:, 0] * f[:, 1]))) < 6 / np.sqrt(50_000)
    # Within 2 % of the normal distribution's shares; a sum of four uniform numbers differs by 0.7 %.
    for bound, share in [(1, 0.6827), (2, 0.9545)]:
        assert abs((np.abs(f) < bound).mean() - share) < 0.02
    assert np.abs(f).max() <= np.sqrt(12)

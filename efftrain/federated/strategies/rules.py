"""Rules that make one update of many, and stand some that lie. Plain NumPy.

The number of samples that a client claims is not looked at: it is the client's word, and as a weight it would be a way
to count more than others.
"""

# K clients, N parameters.

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


def norm_bounded_mean(updates_KN: Floats, bound: float = 0.0) -> Floats:
    """Mean of the updates after each is shortened to a norm of at most ``bound``.

    Args:
        updates_KN: One update a client, fp32, at least one.
        bound: Largest Euclidean norm that counts; 0 takes the median of the updates' norms.

    Returns:
        fp32, ``(N,)``.

    Source: Sun et al., Can You Really Backdoor Federated Learning? (arXiv:1911.07963), section 5, norm thresholding.
    Differs: the bound may follow the cohort, so it need not be known before the first round; every client counts the
    same; no noise is added.
    """
    norms_K = np.sqrt(np.einsum("kn,kn->k", updates_KN, updates_KN, dtype=np.float64))
    limit = bound or float(np.median(norms_K))
    shares_K = np.minimum(1.0, limit / np.maximum(norms_K, np.finfo(np.float64).tiny))
    return _weighted(updates_KN, shares_K / len(updates_KN))


def geometric_median(updates_KN: Floats, iterations: int = 50, tolerance: float = 1e-6) -> Floats:
    """The point with the smallest sum of distances to the updates; up to half of them can lie.

    Args:
        updates_KN: One update a client, fp32, at least one.
        iterations: At most so many steps of Weiszfeld's algorithm, each a weighted mean of all updates.
        tolerance: End when a step moves by less than this share of the mean distance.

    Returns:
        fp32, ``(N,)``.

    Source: Pillutla et al., Robust Aggregation for Federated Learning (arXiv:1912.13445), algorithm 2. Differs: every
    client counts the same, and the smoothing follows the scale of the updates (a millionth of the mean distance), so
    that it has no unit.
    """
    # A few huge liars must not take the first estimate with them: it would only come back over many steps.
    middle_N = np.median(updates_KN, axis=0)
    for _ in range(iterations):
        differences_KN = updates_KN - middle_N
        distances_K = np.sqrt(np.einsum("kn,kn->k", differences_KN, differences_KN, dtype=np.float64))
        scale = float(distances_K.mean())
        if scale == 0:
            break
        weights_K = 1 / np.maximum(distances_K, 1e-6 * scale)
        weights_K /= weights_K.sum()
        step_N = _weighted(differences_KN, weights_K)
        middle_N = middle_N + step_N
        if float(np.linalg.norm(step_N)) <= tolerance * scale:
            break
    return np.asarray(middle_N, np.float32)


def _weighted(updates_KN: Floats, weights_K: npt.NDArray[np.float64]) -> Floats:
    return np.asarray(weights_K.astype(np.float32) @ updates_KN, np.float32)

"""Random numbers that a key alone decides, with the same bits on every machine and in every version of NumPy."""

import numpy as np
import numpy.typing as npt


def split_mix_64(key: int, count: int) -> npt.NDArray[np.uint64]:
    """The first ``count`` outputs of SplitMix64 from the seed ``key``, which counts modulo 2^64.

    Source: Steele et al., Fast Splittable Pseudorandom Number Generators (OOPSLA 2014).
    """
    state = (np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)) + np.uint64(key % (1 << 64))
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))

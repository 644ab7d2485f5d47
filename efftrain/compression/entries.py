"""A sum of sparse tensors that stays sparse: places and values of what is not zero."""

import numpy as np

from efftrain.compression import kernels
from efftrain.compression.sparsify import Indices
from efftrain.compression.wire import Floats

# K entries of a tensor of N elements


class Entries:
    """What ``add`` has added up, for a reader that moves these elements only.

    Args:
        size: ``N``.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.places: Indices = np.empty(0, np.int64)
        """Strictly ascending, shape ``(K,)``."""
        self.values: Floats = np.empty(0, np.float32)
        """Shape ``(K,)``."""

    def add(self, places: Indices, values: Floats, weight: float) -> None:
        """Add ``weight`` times a tensor that has ``values`` at strictly ascending ``places``.

        An element's sum has the bits that adding to a whole tensor of zeros in the same order gives.
        """
        merged = kernels.merge(self.places, self.values, places, values, weight)
        if merged is kernels.MISSING:
            weighted = np.float32(weight) * values
            union = np.union1d(self.places, places)
            total = np.empty(union.size, np.float32)
            known, new = np.searchsorted(union, self.places), np.searchsorted(union, places)
            total[new] = weighted
            total[known] = self.values
            both = np.isin(places, self.places, assume_unique=True)
            total[new[both]] += weighted[both]
            merged = union, total
        self.places, self.values = merged

    def add_to(self, out: Floats, weight: float) -> None:
        """Add ``weight`` times the sum to a tensor, float32, shape ``(N,)``, contiguous."""
        if kernels.scatter_add(self.places, self.values, weight, out) is kernels.MISSING:
            out[self.places] += np.float32(weight) * self.values

    def square(self) -> float:
        """Of the Euclidean norm."""
        return float(np.dot(self.values, self.values))

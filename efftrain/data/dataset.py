"""What a data set is to every trainer here: a length, and batches by index."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from efftrain.errors import ConfigError


@runtime_checkable
class Dataset(Protocol):
    """The two methods a data set of your own needs. Everything else here is built on them.

    Samples are addressed by number, so that partitions, shuffles and a resumed run are plain index arrays.
    """

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def batch(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Some samples, stacked.

        Args:
            indices: Which samples, int64 in ``[0, len)``, shape ``(B,)``; repeats are allowed.

        Returns:
            Inputs ``(B, ...)`` of one fixed dtype (float32, or int64 for tokens) and targets int64, ``(B,)`` or, for a
            sequence model, ``(B, T)``. The caller may change both arrays.
        """
        ...


@dataclass(frozen=True, eq=False)
class ArrayDataset:
    """A data set that lies in memory.

    Raises:
        ConfigError: Lengths differ, or targets are not integers in ``[0, num_classes)``.
    """

    name: str
    inputs: np.ndarray
    """Shape ``(N, ...)``, float32."""
    targets: np.ndarray
    """Shape ``(N,)``, int64 in ``[0, num_classes)``."""
    groups: np.ndarray | None = None
    """Who or what each sample comes from (a person, a device), shape ``(N,)``, integers; the natural partition."""
    num_classes: int = 0
    """Number of classes; 0 means the largest target plus one."""

    def __post_init__(self) -> None:
        num_samples = len(self.inputs)
        if self.targets.shape != (num_samples,) or not np.issubdtype(self.targets.dtype, np.integer):
            raise ConfigError(
                f"Data set {self.name}: expected {num_samples} integer targets, one an input; found "
                f"{self.targets.dtype} of shape {self.targets.shape}."
            )
        if self.groups is not None and self.groups.shape != (num_samples,):
            raise ConfigError(
                f"Data set {self.name}: expected {num_samples} groups, one an input; found shape {self.groups.shape}."
            )
        largest = int(self.targets.max(initial=-1))
        if int(self.targets.min(initial=0)) < 0 or (self.num_classes and largest >= self.num_classes):
            raise ConfigError(
                f"Data set {self.name}: expected targets in [0, {self.num_classes or 'number of classes'}), found "
                f"{int(self.targets.min())} to {largest}."
            )
        if not self.num_classes:
            object.__setattr__(self, "num_classes", largest + 1)

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input, without the batch."""
        return self.inputs.shape[1:]

    def batch(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Copies of some inputs ``(B, ...)`` and their targets ``(B,)``. See ``Dataset.batch``."""
        return self.inputs[indices], self.targets[indices]

    def subset(self, indices: np.ndarray) -> "ArrayDataset":
        """The samples at ``indices`` (int64 numbers, or a mask of ``len(self)`` booleans), in that order, as a copy."""
        return ArrayDataset(
            name=self.name,
            inputs=self.inputs[indices],
            targets=self.targets[indices],
            groups=None if self.groups is None else self.groups[indices],
            num_classes=self.num_classes,
        )


def check_split(dataset: str, split: str, known: Collection[str]) -> None:
    """Refuse a split that ``dataset`` does not have.

    Raises:
        ConfigError: ``split`` is not in ``known``.
    """
    if split not in known:
        raise ConfigError(f"Data set {dataset} has no split {split!r}. Expected one of: {', '.join(known)}.")

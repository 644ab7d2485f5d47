"""What every back end can do."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from efftrain.errors import ConfigError

Samples = npt.NDArray[np.int8]
Labels = npt.NDArray[np.int64] | npt.NDArray[np.int32] | Sequence[int]

MAX_LR_SHIFT = 31


class Engine(ABC):
    """One device with its own trained state. Not thread-safe; make one engine a thread.

    Args:
        input_shape: Height, width, channels.
        num_classes: Labels are in [0, num_classes).
        state_bytes: Length of the trained state.
    """

    def __init__(self, input_shape: tuple[int, int, int], num_classes: int, state_bytes: int) -> None:
        self.input_shape = input_shape
        self.num_classes = num_classes
        self.state_bytes = state_bytes
        self._lr_shift = 0

    # --- what a caller uses -------------------------------------------------------------------------------------------

    def train_step(self, x: Samples, label: int) -> int:
        """Learn from one sample.

        Args:
            x: int8 from ``Program.quantize_input``, ``(H, W, C)`` or anything that reshapes to it.
            label: In [0, num_classes).

        Returns:
            The class that was predicted before the step.

        Raises:
            ValueError: A size, type or label is wrong.
        """
        samples = self._samples(np.asarray(x)[None])
        labels = self._labels([label], 1)
        return self._train_step(samples[0], int(labels[0]))

    def train(self, xs: Samples, labels: Labels, order: Sequence[int] | npt.NDArray[np.int64] | None = None) -> int:
        """Learn from many samples, one after another.

        Args:
            xs: int8, ``(N, H, W, C)``.
            labels: N classes.
            order: Indices into them, repeats allowed; all of them once in turn if not given.

        Returns:
            How many were predicted right before their own step.
        """
        samples = self._samples(xs)
        checked = self._labels(labels, len(samples))
        indices = np.arange(len(samples)) if order is None else np.asarray(order, np.int64)
        if indices.ndim != 1 or (indices.size and not (int(indices.min()) >= 0 and int(indices.max()) < len(samples))):
            raise ValueError(f"order must be a list of indices in [0, {len(samples)})")
        return self._train(samples[indices], checked[indices]) if indices.size else 0

    def predict(self, x: Samples) -> int:
        """The class of one sample."""
        return self._predict(self._samples(np.asarray(x)[None])[0])

    def evaluate(self, xs: Samples, labels: Labels) -> float:
        """Share of samples whose predicted class is their label, in [0, 1]."""
        samples = self._samples(xs)
        checked = self._labels(labels, len(samples))
        if not len(samples):
            raise ValueError("there is nothing to evaluate: no samples")
        return self._count_right(samples, checked) / len(samples)

    @abstractmethod
    def state(self) -> bytes:
        """The trained state in the layout of ``StateLayout``."""

    def state_sha256(self) -> str:
        """Hash of ``state``: equal on two engines if and only if they learned the same, to the bit."""
        return hashlib.sha256(self.state()).hexdigest()

    def load_state(self, state: bytes) -> None:
        """Take over a state.

        Raises:
            ValueError: It is not one of this program; the engine then keeps the one it has.
        """
        if len(state) != self.state_bytes:
            raise ValueError(f"the trained state has {len(state)} bytes; this program's has {self.state_bytes}")
        self._load_state(bytes(state))

    def set_lr_shift(self, halvings: int) -> None:
        """Halve the compiled learning rate so many times, in [0, 31]; not cumulative."""
        if isinstance(halvings, bool) or int(halvings) != halvings or not 0 <= halvings <= MAX_LR_SHIFT:
            raise ConfigError(f"lr shift is {halvings}; it must be an integer in [0, {MAX_LR_SHIFT}]")
        self._set_lr_shift(int(halvings))

    # --- what a back end provides -------------------------------------------------------------------------------------

    @abstractmethod
    def _train_step(self, x: Samples, label: int) -> int: ...

    @abstractmethod
    def _predict(self, x: Samples) -> int: ...

    @abstractmethod
    def _load_state(self, state: bytes) -> None: ...

    @abstractmethod
    def _set_lr_shift(self, halvings: int) -> None: ...

    def _train(self, xs: Samples, labels: npt.NDArray[np.int32]) -> int:
        return sum(self._train_step(x, int(label)) == int(label) for x, label in zip(xs, labels, strict=True))

    def _count_right(self, xs: Samples, labels: npt.NDArray[np.int32]) -> int:
        return sum(self._predict(x) == int(label) for x, label in zip(xs, labels, strict=True))

    def _samples(self, xs: Samples) -> Samples:
        array = np.asarray(xs)
        if array.dtype != np.int8:
            raise ValueError(f"samples are {array.dtype}; they must be int8, from Program.quantize_input")
        size = int(np.prod(self.input_shape))
        if array.ndim < 1 or array.size != len(array) * size:
            raise ValueError(f"samples have shape {array.shape}; expected (N, {', '.join(map(str, self.input_shape))})")
        return np.ascontiguousarray(array).reshape(-1, *self.input_shape)

    def _labels(self, labels: Labels, count: int) -> npt.NDArray[np.int32]:
        array = np.asarray(labels)
        if array.shape != (count,) or (count and array.dtype.kind not in "iu"):
            raise ValueError(f"labels must be {count} integers, one a sample; got shape {array.shape}, {array.dtype}")
        if count and not (int(array.min()) >= 0 and int(array.max()) < self.num_classes):
            raise ValueError(f"labels run from {array.min()} to {array.max()}; they must be in [0, {self.num_classes})")
        return np.ascontiguousarray(array, np.int32)

"""Smartwatch motion of people doing shoulder exercises: ten people, seven exercises. Ships with the package.

A recording is one person doing one exercise with one arm: a series of 900 to 2,600 steps of six channels (acceleration
x y z, rotation rate x y z). A sample is a window of 128 steps; windows start every 64 steps, so neighbours share half
of their steps. See Note [overlapping windows].

Note [overlapping windows]
    Window ``i`` and window ``i + 1`` of a recording share 64 steps. Two parts of a recording that must be independent
    (training and test, what a central server has seen and what stays on the watch) are therefore cut by window position
    with a gap: with ``gap=1`` they share no step; the study that set our reference figures skips two.

Source: the seglearn 1.2.5 package (BSD-3-Clause); D. Burns et al., "Shoulder physiotherapy exercise recognition:
    machine learning the inertial signals from a smartwatch", Physiol. Meas. 39 (2018).
Differs: values are stored as int16 with one scale a channel. The error is at most 0.05 % of a channel's standard
    deviation, 0.03 % rms.
"""

# W windows, C = 6 channels, T = 128 steps of a window, R = 140 recordings

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np

from efftrain.data.dataset import ArrayDataset, check_split
from efftrain.data.shipped import load_shipped
from efftrain.errors import ConfigError

EXERCISES = (
    "pendulum",
    "abduction",
    "forward elevation",
    "internal rotation",
    "external rotation",
    "trapezius extension",
    "upright row",
)
CHANNELS = ("ax", "ay", "az", "wx", "wy", "wz")
PEOPLE = tuple(range(1, 11))

WINDOW_STEPS = 128
STRIDE_STEPS = 64


@dataclass(frozen=True)
class Span:
    """A consecutive part of every recording, by window position.

    Of a recording with ``n`` windows it holds the positions ``p`` with ``start * n + gap <= p < end * n``; a part that
    starts at 0 has no gap, for there is nothing before it.

    Raises:
        ConfigError: Not ``0 <= start < end <= 1``, or a negative gap.
    """

    start: float
    end: float
    gap: int = 1
    """Windows left out at the start. 1 shares no step with the part before; see Note [overlapping windows]."""

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end <= 1 or self.gap < 0:
            raise ConfigError(f"Expected 0 <= start < end <= 1 and gap >= 0, found {self}.")

    def mask(self, positions: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Which windows are in the part.

        Args:
            positions: Position of each window in its recording, integers ``(W,)``.
            lengths: Number of windows of that recording, integers ``(W,)``.

        Returns:
            Booleans ``(W,)``.
        """
        first = self.start * lengths + (self.gap if self.start > 0 else 0)
        return np.asarray((positions >= first) & (positions < self.end * lengths))


PARTS: Mapping[str, Span] = {
    "all": Span(0.0, 1.0),
    # Fine-tuning on a person never seen, as in the study of the on-device arithmetic.
    "first30": Span(0.0, 0.3),
    "rest70": Span(0.3, 1.0, gap=2),
    # The demo: what a server has seen, what never leaves the watch, what measures both.
    "early": Span(0.0, 0.2),
    "middle": Span(0.2, 0.7),
    "late": Span(0.7, 1.0),
}
"""Parts by name: ``first30`` + ``rest70`` are one cut of every recording, ``early`` + ``middle`` + ``late`` another."""


@dataclass(frozen=True, eq=False)
class Standardizer:
    """Takes every channel to mean 0 and standard deviation 1, with figures of the data it was fitted on.

    Fit it on training data and use the same one for everything the model ever sees.
    """

    mean: np.ndarray
    """Shape ``(C,)``, float32."""
    std: np.ndarray
    """Shape ``(C,)``, float32, above 0."""

    def apply(self, inputs: np.ndarray) -> np.ndarray:
        """``(inputs - mean) / std`` for inputs ``(..., C, T)``, as a new float32 array."""
        return np.asarray((inputs - self.mean[:, None]) / self.std[:, None], np.float32)

    @classmethod
    def fit(cls, inputs: np.ndarray) -> "Standardizer":
        """Mean and standard deviation per channel of inputs ``(W, C, T)``.

        Raises:
            ConfigError: There are no windows, or a channel is constant.
        """
        if not len(inputs):
            raise ConfigError("A Standardizer needs at least one window to be fitted on, found none.")
        mean = inputs.mean(axis=(0, 2), dtype=np.float64).astype(np.float32)
        std = inputs.std(axis=(0, 2), dtype=np.float64).astype(np.float32)
        if not (std > 0).all():
            raise ConfigError(f"Cannot standardize: channels {np.flatnonzero(std <= 0).tolist()} are constant.")
        return cls(mean, std)


def standardize(dataset: ArrayDataset, by: Standardizer | None = None) -> tuple[ArrayDataset, Standardizer]:
    """Standardize a data set, with its own figures or with those of another.

    Args:
        dataset: Inputs ``(W, C, T)``. Not changed.
        by: Fitted on the training data; None fits one on ``dataset`` itself, which is right only if that is it.

    Returns:
        The data set with new inputs, and the standardizer that was used.

    Raises:
        ConfigError: ``by`` is None and ``dataset`` is empty or has a constant channel.
    """
    by = by or Standardizer.fit(dataset.inputs)
    inputs = by.apply(dataset.inputs)
    return ArrayDataset(dataset.name, inputs, dataset.targets, dataset.groups, dataset.num_classes), by


@dataclass(frozen=True, eq=False)
class WatchData:
    """Every window, in the order of the recordings. The arrays are shared and read-only."""

    windows: np.ndarray
    """Shape ``(3605, 6, 128)``, float32, in the units of the source; see `standardize`."""
    labels: np.ndarray
    """Exercise of each window, index into ``EXERCISES``, int64."""
    people: np.ndarray
    """Person of each window, 1 to 10, int64."""
    recordings: np.ndarray
    """Recording of each window, 0 to 139, int64."""
    positions: np.ndarray
    """Position of each window in its recording, from 0, int64."""
    recording_lengths: np.ndarray
    """Number of windows of each recording, shape ``(140,)``, int64 (13 to 39)."""

    def select(
        self,
        people: Collection[int] | int | None = None,
        part: str = "all",
        span: Span | None = None,
    ) -> ArrayDataset:
        """Some people's windows, raw units, grouped by person.

        Three uses. Leave one out: ``select(people=[everyone else])``, then ``select(9, "first30")`` to fine-tune and
        ``select(9, "rest70")`` to test. The demo: ``early``, ``middle`` and ``late``. Anything else: a ``span``.

        Args:
            people: Whose, from 1 to 10; one number, several, or None for everyone.
            part: A key of ``PARTS``.
            span: Used instead of ``part``.

        Returns:
            Inputs ``(N, 6, 128)`` float32, targets, and the person of each window as ``groups``, in recording order.

        Raises:
            ConfigError: An unknown person or part.
        """
        chosen = PEOPLE if people is None else (people,) if isinstance(people, int) else tuple(people)
        unknown = sorted(set(chosen) - set(PEOPLE))
        if unknown or not chosen:
            raise ConfigError(f"Expected people from 1 to 10, found {unknown or 'none'}.")
        if span is None:
            if part not in PARTS:
                raise ConfigError(f"The watch data has no part {part!r}. Expected one of: {', '.join(PARTS)}.")
            span = PARTS[part]
        mask = np.isin(self.people, list(chosen)) & span.mask(self.positions, self.recording_lengths[self.recordings])
        return ArrayDataset("watch", self.windows[mask], self.labels[mask], self.people[mask], len(EXERCISES))


@cache
def load_watch() -> WatchData:
    """The whole data set, read once per process (11 MB of memory, about 0.1 s).

    Raises:
        DataError: The shipped file is missing or damaged.
    """
    arrays = load_shipped("watch.npz")
    samples = arrays["samples"].astype(np.float32) * arrays["scale"][:, None]
    num_steps = arrays["recording_lengths"].astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(num_steps)[:-1]])
    lengths = (num_steps - WINDOW_STEPS) // STRIDE_STEPS + 1
    recordings = np.repeat(np.arange(len(lengths)), lengths)
    positions = np.concatenate([np.arange(length) for length in lengths])
    firsts = starts[recordings] + positions * STRIDE_STEPS
    windows = samples[:, firsts[:, None] + np.arange(WINDOW_STEPS)].transpose(1, 0, 2)
    data = WatchData(
        windows=np.ascontiguousarray(windows),
        labels=arrays["labels"].astype(np.int64)[recordings],
        people=arrays["people"].astype(np.int64)[recordings],
        recordings=recordings,
        positions=positions,
        recording_lengths=lengths,
    )
    # Shared by every caller of this process, so nobody may write into it.
    for array in vars(data).values():
        array.setflags(write=False)
    return data


def watch_split(split: str = "train", people: int = 9, train_share: float = 0.7) -> ArrayDataset:
    """The data set as one classification task, standardized by its training windows.

    Some people are kept out of both training and test: ``train`` is the first ``train_share`` of every recording of
    people 1 to ``people``, ``test`` the last 30 % of the same recordings with a gap of one window, ``unseen``
    everything of the other people. So ``test`` measures new movements of known people, and ``unseen`` new people.

    Args:
        split: ``train``, ``test`` or ``unseen``.
        people: Number of people in training, 1 to 9.
        train_share: In ``(0, 0.7]``.

    Raises:
        ConfigError: Another split, or an option out of its range.
        DataError: The shipped file is missing or damaged.
    """
    check_split("watch", split, ("train", "test", "unseen"))
    if not 1 <= people < len(PEOPLE) or not 0 < train_share <= 0.7:
        raise ConfigError(
            f"Data set watch: people is {people}, expected 1 to {len(PEOPLE) - 1}; "
            f"train_share is {train_share}, expected more than 0 and at most 0.7."
        )
    data = load_watch()
    train, standardizer = standardize(data.select(PEOPLE[:people], span=Span(0.0, train_share)))
    if split == "train":
        return train
    chosen = data.select(PEOPLE[:people], "late") if split == "test" else data.select(PEOPLE[people:])
    return standardize(chosen, standardizer)[0]

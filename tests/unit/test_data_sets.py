import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from efftrain.data import (
    DATASETS,
    ArrayDataset,
    Dataset,
    Span,
    Standardizer,
    load_dataset,
    load_watch,
    standardize,
)
from efftrain.data.fashion_mnist import DEBIAN_FOLDER
from efftrain.data.pytext import load_pytext
from efftrain.data.watch import PARTS, PEOPLE, STRIDE_STEPS, WINDOW_STEPS
from efftrain.errors import ConfigError, DataError

needs_fashion = pytest.mark.skipif(not DEBIAN_FOLDER.is_dir(), reason="the dataset-fashion-mnist package is missing")


def small(**changes: object) -> ArrayDataset:
    fields: dict[str, object] = {
        "name": "small",
        "inputs": np.arange(12, dtype=np.float32).reshape(4, 3),
        "targets": np.array([0, 1, 2, 1]),
        "groups": np.array([7, 7, 8, 9]),
        "num_classes": 3,
    }
    return ArrayDataset(**{**fields, **changes})  # type: ignore[arg-type]


def test_an_array_dataset_batches_and_subsets() -> None:
    data = small()
    assert isinstance(data, Dataset)
    assert (len(data), data.input_shape, data.num_classes) == (4, (3,), 3)
    inputs, targets = data.batch(np.array([3, 0]))
    assert inputs.tolist() == [[9, 10, 11], [0, 1, 2]]
    assert targets.tolist() == [1, 0]
    inputs[:] = 0
    assert data.inputs[3].tolist() == [9, 10, 11], "a batch is a copy"
    part = data.subset(np.array([2, 1]))
    assert part.groups is not None
    assert (part.targets.tolist(), part.groups.tolist(), part.num_classes) == ([2, 1], [8, 7], 3)
    assert len(data.subset(np.array([True, False, False, True]))) == 2
    assert small(num_classes=0).num_classes == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": np.array([0, 1])}, "expected 4 integer targets"),
        ({"targets": np.array([0.0, 1, 2, 1])}, "expected 4 integer targets"),
        ({"targets": np.array([0, 1, 3, 1])}, r"expected targets in \[0, 3\), found 0 to 3"),
        ({"targets": np.array([0, -1, 2, 1])}, r"expected targets in \[0, 3\), found -1 to 2"),
        ({"groups": np.array([1])}, "expected 4 groups"),
    ],
)
def test_an_array_dataset_refuses_what_does_not_fit(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small(**changes)


SIZES = {
    "watch": (2301, 778, (6, 128), 7),
    "digits": (1437, 360, (1, 8, 8), 10),
    "fashion-mnist": (60000, 10000, (1, 28, 28), 10),
}


@pytest.mark.parametrize("name", ["watch", "digits", pytest.param("fashion-mnist", marks=needs_fashion)])
def test_classification_sets_have_their_known_sizes(name: str) -> None:
    num_train, num_test, shape, num_classes = SIZES[name]
    for split, expected in (("train", num_train), ("test", num_test)):
        data = load_dataset(name, split)
        assert isinstance(data, ArrayDataset)
        assert (len(data), data.input_shape, data.num_classes) == (expected, shape, num_classes)
        assert data.inputs.dtype == np.float32
        assert data.targets.dtype == np.int64
        assert len(np.unique(data.targets)) == num_classes
        assert np.isfinite(data.inputs).all()
        if name != "watch":
            assert data.inputs.min() == 0
            assert data.inputs.max() == 1


def test_digits_splits_hold_every_image_once() -> None:
    from efftrain.data.shipped import load_shipped

    stored = load_shipped("digits.npz")["images"].astype(int).sum()
    splits = [load_dataset("digits", split).batch(np.arange(n))[0] for split, n in (("train", 1437), ("test", 360))]
    assert round(sum(16 * part.astype(float).sum() for part in splits)) == stored


def test_unknown_names_splits_and_options_say_what_is_known(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Unknown data set 'digit'. Did you mean 'digits'\? Known: watch, digits"):
        load_dataset("digit")
    with pytest.raises(ConfigError, match=r"has no split 'validation'\. Expected one of: train, test, unseen"):
        load_dataset("watch", "validation")
    with pytest.raises(ConfigError, match=r"Data set pytext has no option 'contxt'\. Expected: context, folder"):
        load_dataset("pytext", contxt=3)
    assert set(DATASETS) == {"watch", "digits", "fashion-mnist", "pytext"}


OWN = """
import numpy as np

class Mine:
    def __init__(self, split="train"):
        self.split = split
    def __len__(self):
        return 3 if self.split == "train" else 2
    def batch(self, indices):
        return np.zeros((len(indices), 2), np.float32), np.zeros(len(indices), np.int64)

ready = Mine()
number = 3
def broken(split):
    return 3
def unhelpful():
    return ready
"""


def test_a_users_own_file_gives_a_data_set(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(OWN)
    assert len(load_dataset(f"{path}:ready", "test")) == 3
    assert len(load_dataset(f"{path}:Mine", "test")) == 2
    for name, message in (
        ("number", "expected an object with __len__"),
        ("broken", "found int"),
        ("unhelpful", r"calling unhelpful\(split='train'\) failed"),
        ("missing", "has no 'missing'. It has: np, Mine, ready"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_dataset(f"{path}:{name}")
    with pytest.raises(ConfigError, match="there is no file"):
        load_dataset(f"{tmp_path}/other.py:ready")
    path.write_text("import nothing_of_this_name")
    with pytest.raises(ConfigError, match="ModuleNotFoundError"):
        load_dataset(f"{path}:ready")


def test_the_data_package_needs_no_torch() -> None:
    code = (
        "import sys, efftrain.data as d\n"
        "d.load_dataset('watch'), d.load_dataset('digits')\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Watch


def test_watch_has_its_known_shape() -> None:
    data = load_watch()
    assert data.windows.shape == (3605, 6, 128)
    assert data.windows.dtype == np.float32
    assert len(data.recording_lengths) == 140
    assert data.recording_lengths.sum() == 3605
    assert sorted(set(data.people.tolist())) == list(range(1, 11))
    assert np.bincount(data.people)[1:].tolist() == [433, 418, 234, 226, 377, 367, 405, 372, 373, 400]
    for array in vars(data).values():
        assert not array.flags.writeable


def test_watch_windows_overlap_by_half_inside_a_recording() -> None:
    data = load_watch()
    same = (data.recordings[1:] == data.recordings[:-1]).nonzero()[0]
    assert len(same) == 3605 - 140
    assert np.array_equal(data.windows[same][..., STRIDE_STEPS:], data.windows[same + 1][..., :STRIDE_STEPS])


def test_the_study_cut_is_reproduced() -> None:
    """Windows at ``i < 0.3 n`` fine-tune, two are skipped, the rest tests: 74 to 137 windows a person."""
    data = load_watch()
    tune = [len(data.select(person, "first30")) for person in PEOPLE]
    rest = [len(data.select(person, "rest70")) for person in PEOPLE]
    assert tune == [137, 131, 76, 74, 119, 116, 128, 117, 117, 127]
    assert sum(tune) + sum(rest) + 2 * 140 == 3605


def steps_of(part: str) -> set[tuple[int, int]]:
    """Every (recording, step) that a part's windows touch."""
    data = load_watch()
    mask = PARTS[part].mask(data.positions, data.recording_lengths[data.recordings])
    return {
        (recording, position * STRIDE_STEPS + step)
        for recording, position in zip(data.recordings[mask].tolist(), data.positions[mask].tolist(), strict=True)
        for step in range(WINDOW_STEPS)
    }


@pytest.mark.parametrize("parts", [("early", "middle", "late"), ("first30", "rest70")])
def test_parts_of_one_cut_share_no_step_of_any_recording(parts: tuple[str, ...]) -> None:
    touched = [steps_of(part) for part in parts]
    assert sum(map(len, touched)) == len(set().union(*touched))


def test_every_part_holds_every_exercise_of_every_person() -> None:
    for part in PARTS:
        for person in PEOPLE:
            assert len(np.unique(load_watch().select(person, part).targets)) == 7


def test_watch_selection_is_by_person_and_checked() -> None:
    data = load_watch()
    chosen = data.select([2, 5])
    assert chosen.groups is not None
    assert set(chosen.groups.tolist()) == {2, 5}
    assert len(data.select()) == 3605
    assert len(data.select(3, span=Span(0.5, 1.0, gap=0))) < len(data.select(3))
    with pytest.raises(ConfigError, match="people from 1 to 10, found"):
        data.select(11)
    with pytest.raises(ConfigError, match=r"no part 'begin'\. Expected one of: all, first30"):
        data.select(part="begin")
    for wrong in ((0.5, 0.5, 1), (-0.1, 0.5, 1), (0.5, 1.1, 1), (0.1, 0.5, -1)):
        with pytest.raises(ConfigError, match="0 <= start < end <= 1"):
            Span(*wrong)


def test_a_standardizer_is_fitted_once_and_reused() -> None:
    data = load_watch()
    train, standardizer = standardize(data.select([1, 2, 3]))
    assert np.abs(train.inputs.mean(axis=(0, 2))).max() < 1e-4
    assert np.abs(train.inputs.std(axis=(0, 2)) - 1).max() < 1e-3
    test, same = standardize(data.select(4), standardizer)
    assert same is standardizer
    assert np.abs(test.inputs.std(axis=(0, 2)) - 1).max() > 0.01
    with pytest.raises(ConfigError, match="at least one window"):
        Standardizer.fit(np.zeros((0, 6, 128), np.float32))
    with pytest.raises(ConfigError, match=r"channels \[1\] are constant"):
        Standardizer.fit(np.stack([np.arange(8.0), np.ones(8)])[None])


# Text


def tree(tmp_path: Path) -> Path:
    for number in range(200):
        folder = tmp_path / f"p{number % 7}"
        folder.mkdir(exist_ok=True)
        (folder / f"m{number}.py").write_text(f"value_{number} = {number}\n")
    (tmp_path / "p0" / "test").mkdir()
    (tmp_path / "p0" / "test" / "t.py").write_text("never = 'seen'\n" * 50)
    (tmp_path / "p1" / "notes.txt").write_text("never seen")
    return tmp_path


def test_text_targets_are_the_next_bytes(tmp_path: Path) -> None:
    data = load_pytext("train", context=16, folder=tree(tmp_path))
    inputs, targets = data.batch(np.arange(len(data)))
    assert inputs.shape == targets.shape == (len(data), 16)
    assert inputs.dtype == targets.dtype == np.int64
    assert np.array_equal(inputs.reshape(-1), data.text[: inputs.size])
    assert np.array_equal(targets.reshape(-1), data.text[1 : inputs.size + 1])
    with pytest.raises(IndexError, match="sequences, found index"):
        data.batch(np.array([len(data)]))


def test_text_splits_are_by_file_and_the_same_every_time(tmp_path: Path) -> None:
    root = tree(tmp_path)
    train, test = load_pytext("train", 8, root), load_pytext("test", 8, root)
    assert train.num_files + test.num_files == 200
    assert 3 <= test.num_files <= 30
    files = bytes(train.text) + bytes(test.text)
    assert b"never" not in files
    assert files.count(b"\x00") == 200
    assert load_pytext("train", 32, root).sha256 == train.sha256
    # Order and split do not depend on when or in which order files were made.
    again = tmp_path / "again"
    for path in sorted(root.glob("p*/*.py"), reverse=True):
        copy = again / path.relative_to(root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    assert load_pytext("train", 8, again).sha256 == train.sha256


def test_the_standard_library_is_enough_text() -> None:
    data = load_dataset("pytext", context=64)
    assert len(data) > 50_000
    inputs, _ = data.batch(np.array([0, len(data) - 1]))
    assert inputs.shape == (2, 64)


def test_too_little_text_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected at least 129 bytes of \.py files for train, found 0 in 0 files"):
        load_pytext(folder=tmp_path)
    with pytest.raises(ConfigError, match="context of at least 1"):
        load_pytext(context=0)


def test_watch_splits_take_fewer_people_and_a_shorter_train_part() -> None:
    """The demo trains on the early part of eight people and keeps two unseen."""
    early = load_dataset("watch", "train", people=8, train_share=0.2)
    assert len(early) == len(load_watch().select(PEOPLE[:8], "early"))
    unseen = load_dataset("watch", "unseen", people=8, train_share=0.2)
    assert isinstance(unseen, ArrayDataset)
    assert unseen.groups is not None
    assert set(unseen.groups.tolist()) == {9, 10}
    for options in ({"people": 10}, {"people": 0}, {"train_share": 0.8}, {"train_share": 0.0}):
        with pytest.raises(ConfigError, match=r"people is .*, expected 1 to 9; train_share is"):
            load_dataset("watch", **options)

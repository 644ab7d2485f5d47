"""The source code of Python's standard library as bytes: real text for small language models, on every machine.

What is in it depends on the Python that runs, so ``sha256`` names the text exactly: put it beside every figure.
"""

# B sequences of a batch, T = context

import hashlib
import os
import sysconfig
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np

from efftrain.data.dataset import check_split
from efftrain.errors import ConfigError, DataError

VOCAB = 256
SEPARATOR = b"\x00"
"""Between two files. Python sources hold no zero byte, so a model can learn where a file starts."""

TEST_SHARE = 1 / 16
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "__phello__"}


@dataclass(frozen=True, eq=False)
class PyText:
    """Byte sequences of fixed length and, as targets, the byte after each byte. A ``Dataset``."""

    text: np.ndarray
    """All files of the split with ``SEPARATOR`` after each, uint8, read-only."""
    context: int
    """Length ``T`` of every sequence in bytes."""
    num_files: int
    sha256: str
    """Hex digest of ``text``."""
    name: str = "pytext"
    num_classes: int = field(default=VOCAB, init=False)

    def __len__(self) -> int:
        # Sequence i needs the byte after its last one as a target.
        return (len(self.text) - 1) // self.context

    @property
    def input_shape(self) -> tuple[int, ...]:
        """``(context,)``."""
        return (self.context,)

    def batch(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sequences that do not overlap, in the order of the text.

        Args:
            indices: Which ones, int64 ``(B,)`` in ``[0, len)``.

        Returns:
            Bytes and next bytes, both int64 ``(B, T)`` in ``[0, 256)``.

        Raises:
            IndexError: An index is outside ``[0, len)``.
        """
        indices = np.asarray(indices, np.int64)
        if indices.size and (indices.min() < 0 or indices.max() >= len(self)):
            raise IndexError(f"pytext has {len(self)} sequences, found index {indices.min()} to {indices.max()}.")
        at = indices[:, None] * self.context + np.arange(self.context + 1)
        rows = self.text[at].astype(np.int64)
        return rows[:, :-1], rows[:, 1:]


def load_pytext(split: str = "train", context: int = 128, folder: str | Path | None = None) -> PyText:
    """One split of the text. A file is in ``test`` or ``train`` by the hash of its content, about 1 in 16 in ``test``.

    Args:
        split: ``"train"`` or ``"test"``.
        context: Length of a sequence in bytes, at least 1.
        folder: Another tree of ``.py`` files; None is the standard library of the Python that runs. Folders of tests
            and of installed packages are left out, and links are not followed.

    Returns:
        The data set; 10 MB of text in about 0.3 s for the standard library.

    Raises:
        ConfigError: Another split, or ``context`` below 1.
        DataError: There is too little text for one sequence.
    """
    check_split("pytext", split, ("train", "test"))
    if context < 1:
        raise ConfigError(f"Expected a context of at least 1 byte, found {context}.")
    root = Path(folder) if folder is not None else Path(sysconfig.get_paths()["stdlib"])
    text, num_files = _read(root)[split]
    if len(text) < context + 1:
        raise DataError(
            f"{root}: expected at least {context + 1} bytes of .py files for {split}, found {len(text)} in {num_files} "
            "files. Lower the context, or install Python with the sources of its standard library."
        )
    return PyText(np.frombuffer(text, np.uint8), context, num_files, hashlib.sha256(text).hexdigest())


@cache
def _read(root: Path) -> dict[str, tuple[bytes, int]]:
    """Split -> its text and its number of files. Cached: both splits need one walk over all files."""
    files: dict[str, list[bytes]] = {"train": [], "test": []}
    paths: list[Path] = []
    for folder, below, names in os.walk(root):
        # Pruned in place: site-packages may hold a hundred thousand files.
        below[:] = [name for name in below if name not in _SKIPPED_FOLDERS]
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    # Sorted by the parts of the relative path, so that the order depends on no file system and no separator.
    for path in sorted(paths, key=lambda path: path.relative_to(root).parts):
        if path.is_symlink():
            continue
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error}).") from error
        # By content: two copies of one file must not be in both splits.
        share = hashlib.sha256(content).digest()[0] / 256
        files["test" if share < TEST_SHARE else "train"].append(content + SEPARATOR)
    return {split: (b"".join(contents), len(contents)) for split, contents in files.items()}

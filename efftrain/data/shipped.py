"""The data files in the wheel, and a strict reader for ``.npz`` archives.

A file is believed only after its SHA-256 was checked; and even then it is read against a list of the arrays it must
hold, because a reader that guesses at what a file meant is how a wrong file becomes wrong numbers.
"""

import hashlib
import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from efftrain.errors import DataError

FILES = Path(__file__).parent / "files"

REINSTALL = "Reinstall efftrain: pip install --force-reinstall --no-deps efftrain"


@dataclass(frozen=True)
class Member:
    """One array an archive must hold."""

    dtype: str
    """NumPy's name of the element type, ``"int16"``."""
    shape: tuple[int | None, ...]
    """Its shape; ``None`` where any length from 0 to ``MAX_LENGTH`` is right."""


@dataclass(frozen=True)
class Shipped:
    """What we know of a file in the wheel."""

    num_bytes: int
    sha256: str
    members: Mapping[str, Member]


SHIPPED: Mapping[str, Shipped] = {
    "watch.npz": Shipped(
        num_bytes=2691161,
        sha256="806d88ab7935e1224c5b3c616ac2eb81a034146f49ac54b6238c47ad3cdda209",
        members={
            "samples": Member("int16", (6, 244102)),
            "scale": Member("float32", (6,)),
            "recording_lengths": Member("int32", (140,)),
            "labels": Member("uint8", (140,)),
            "people": Member("uint8", (140,)),
            "sides": Member("uint8", (140,)),
        },
    ),
    "digits.npz": Shipped(
        num_bytes=45394,
        sha256="b2dab7b501728c22e9119ad76740b2e17c77a231e42d1e592380d90886f1a05e",
        members={"images": Member("uint8", (1797, 8, 8)), "labels": Member("uint8", (1797,))},
    ),
}

MAX_LENGTH = 1 << 28


def load_shipped(name: str, folder: Path = FILES) -> dict[str, np.ndarray]:
    """The arrays of one shipped file, its integrity checked.

    Args:
        name: A key of ``SHIPPED``.
        folder: Where the file is; another folder than the package's own is for tests.

    Returns:
        Name -> array, with the dtypes and shapes of ``SHIPPED[name].members``.

    Raises:
        DataError: The file is missing, or one byte of it differs from what was shipped.
    """
    facts = SHIPPED[name]
    return read_npz(folder / name, facts.members, num_bytes=facts.num_bytes, sha256=facts.sha256, remedy=REINSTALL)


def read_npz(
    path: Path,
    members: Mapping[str, Member],
    *,
    num_bytes: int | None = None,
    sha256: str | None = None,
    remedy: str = "Make the file again.",
) -> dict[str, np.ndarray]:
    """Read an ``.npz`` archive that must hold exactly ``members``. Never unpickles, never reads more than they need.

    Args:
        path: The archive.
        members: Name -> dtype and shape of every array it must hold, no more and no fewer.
        num_bytes: Size of the file, if it is known.
        sha256: Hex digest of the file, if it is known; checked before anything is parsed.
        remedy: Last sentence of every error.

    Returns:
        Name -> array, C-ordered and read-only.

    Raises:
        DataError: The file is missing, unreadable, or anything in it is not as stated. Nothing else is raised, whatever
            the bytes are.
    """
    try:
        found_bytes = path.stat().st_size
        if num_bytes is not None and found_bytes != num_bytes:
            raise DataError(f"{path}: expected {num_bytes} bytes, found {found_bytes}. {remedy}")
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}). {remedy}") from error
    if sha256 is not None:
        found = hashlib.sha256(data).hexdigest()
        if found != sha256:
            raise DataError(f"{path}: expected SHA-256 {sha256}, found {found}. {remedy}")
    try:
        return _parse_npz(data, members)
    except _Mismatch as mismatch:
        raise DataError(f"{path}: {mismatch}. {remedy}") from None
    # zipfile, zlib, struct, tokenize and NumPy's header parser all leak their own exceptions on hostile bytes.
    except Exception as error:
        raise DataError(
            f"{path}: expected an .npz archive of {', '.join(members)}, found bytes that do not parse "
            f"({type(error).__name__}: {error}). {remedy}"
        ) from error


class _Mismatch(Exception):
    """What was expected and what was found; the caller adds the file and the remedy."""


def _parse_npz(data: bytes, members: Mapping[str, Member]) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        found = sorted(archive.namelist())
        expected = sorted(f"{name}.npy" for name in members)
        if found != expected:
            raise _Mismatch(f"expected the members {expected}, found {found[:20]}")
        return {name: _parse_npy(name, archive, member) for name, member in members.items()}


def _parse_npy(name: str, archive: zipfile.ZipFile, member: Member) -> np.ndarray:
    dtype = np.dtype(member.dtype)
    with archive.open(f"{name}.npy") as stream:
        version = np.lib.format.read_magic(stream)
        if version == (1, 0):
            shape, fortran, found = np.lib.format.read_array_header_1_0(stream)
        elif version == (2, 0):
            shape, fortran, found = np.lib.format.read_array_header_2_0(stream)
        else:
            raise _Mismatch(f"array {name}: expected .npy version 1.0 or 2.0, found {version}")
        if found != dtype or fortran:
            order = ", Fortran order" if fortran else ""
            raise _Mismatch(f"array {name}: expected {member.dtype} in C order, found {found}{order}")
        fits = len(shape) == len(member.shape) and all(
            0 <= length <= MAX_LENGTH if wanted is None else length == wanted
            for length, wanted in zip(shape, member.shape, strict=True)
        )
        if not fits:
            raise _Mismatch(f"array {name}: expected shape {member.shape}, found {shape}")
        # Python integers: a product of hostile lengths must not wrap.
        expected_bytes = dtype.itemsize
        for length in shape:
            expected_bytes *= int(length)
        # One byte more than is right shows a member that goes on; a member of any size is never read whole.
        raw = stream.read(expected_bytes + 1)
    if len(raw) != expected_bytes:
        more = "more" if len(raw) > expected_bytes else str(len(raw))
        raise _Mismatch(f"array {name}: expected {expected_bytes} bytes of data, found {more}")
    return np.frombuffer(raw, dtype).reshape(shape)

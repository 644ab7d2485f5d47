"""Fashion-MNIST: 70,000 images of clothes, 28x28 pixels, ten classes. Read from four idx files; does not ship.

The files are looked for in this order: the ``folder`` argument (then nowhere else), ``$EFFTRAIN_DATA/fashion-mnist``,
``$EFFTRAIN_DATA``, the folder of Debian's ``dataset-fashion-mnist`` package, and the user's cache, where
``download_fashion_mnist`` puts them. Compressed (``.gz``) or not makes no difference: the checksums are of the content.

Source: H. Xiao, K. Rasul, R. Vollgraf, "Fashion-MNIST" (arXiv:1708.07747), MIT licence.
"""

import gzip
import hashlib
import os
import tempfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from efftrain.data.dataset import ArrayDataset, check_split
from efftrain.errors import ConfigError, DataError

CLASSES = (
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)

PUBLIC_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
"""Where the authors publish the files. Plain HTTP; the checksums make that safe."""

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")

# Name without .gz -> shape and SHA-256 of the uncompressed file.
FILES: Mapping[str, tuple[tuple[int, ...], str]] = {
    "train-images-idx3-ubyte": (
        (60000, 28, 28),
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    ),
    "train-labels-idx1-ubyte": ((60000,), "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"),
    "t10k-images-idx3-ubyte": ((10000, 28, 28), "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"),
    "t10k-labels-idx1-ubyte": ((10000,), "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"),
}

_PREFIX = {"train": "train", "test": "t10k"}
_DOWNLOAD_LIMIT_BYTES = 64 << 20
_DOWNLOAD_TIMEOUT_S = 60
_REMEDY = (
    "Install it with `apt-get install dataset-fashion-mnist`, or fetch it with "
    "efftrain.data.download_fashion_mnist(), or name its folder in EFFTRAIN_DATA."
)


def load_fashion_mnist(split: str = "train", folder: str | Path | None = None) -> ArrayDataset:
    """One split: 60,000 training or 10,000 test images.

    Args:
        split: ``"train"`` or ``"test"``.
        folder: Folder of the idx files; None searches the places listed at the top of this file.

    Returns:
        Inputs ``(N, 1, 28, 28)`` float32 in ``[0, 1]`` (188 MB for ``train``), targets 0 to 9.

    Raises:
        ConfigError: Another split.
        DataError: Files are missing, truncated, or not Fashion-MNIST.
    """
    check_split("fashion-mnist", split, tuple(_PREFIX))
    names = (f"{_PREFIX[split]}-images-idx3-ubyte", f"{_PREFIX[split]}-labels-idx1-ubyte")
    found = _find(names, folder)
    images, labels = (
        read_idx(path, FILES[name][0], sha256=FILES[name][1]) for name, path in zip(names, found, strict=True)
    )
    inputs = images[:, None].astype(np.float32)
    inputs /= 255
    return ArrayDataset("fashion-mnist", inputs, labels.astype(np.int64), None, len(CLASSES))


def read_idx(path: Path, shape: tuple[int, ...], sha256: str | None = None) -> np.ndarray:
    """Read one idx file of bytes, compressed if its name ends in ``.gz``.

    Args:
        path: The file.
        shape: The shape that it must have. No more than this is ever read or decompressed.
        sha256: Hex digest of the uncompressed file, if it is known.

    Returns:
        uint8 array of ``shape``, read-only.

    Raises:
        DataError: The file is missing, truncated, longer or other than stated, or damaged.
    """
    expected_bytes = 4 + 4 * len(shape) + int(np.prod(shape, dtype=object))
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            # One byte more than is right, so that a file that goes on is noticed and a gzip bomb is not inflated.
            data = stream.read(expected_bytes + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: expected a whole gzip file, found a damaged one ({error}). {_REMEDY}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}). {_REMEDY}") from error
    array = parse_idx(data, shape, what=str(path))
    if sha256 is not None:
        found = hashlib.sha256(data).hexdigest()
        if found != sha256:
            raise DataError(f"{path}: expected SHA-256 {sha256} (uncompressed), found {found}. {_REMEDY}")
    return array


def parse_idx(data: bytes, shape: tuple[int, ...], what: str = "idx data") -> np.ndarray:
    """Parse the bytes of an idx file: two zeros, type 8 (unsigned byte), number of dims, big-endian dims, elements.

    Returns:
        uint8 array of ``shape`` that shares memory with ``data``.

    Raises:
        DataError: Anything differs from that or from ``shape``. Nothing else is raised, whatever the bytes are.
    """
    header_bytes = 4 + 4 * len(shape)
    magic = bytes((0, 0, 8, len(shape)))
    if data[:4] != magic:
        raise DataError(f"{what}: expected the idx magic {magic.hex()}, found {data[:4].hex() or 'nothing'}. {_REMEDY}")
    if len(data) < header_bytes:
        raise DataError(f"{what}: expected a header of {header_bytes} bytes, found {len(data)} bytes. {_REMEDY}")
    found = tuple(int.from_bytes(data[at : at + 4], "big") for at in range(4, header_bytes, 4))
    if found != shape:
        raise DataError(f"{what}: expected dimensions {shape}, found {found}. {_REMEDY}")
    expected_bytes = header_bytes + int(np.prod(shape, dtype=object))
    if len(data) != expected_bytes:
        more = "more" if len(data) > expected_bytes else str(len(data))
        raise DataError(f"{what}: expected {expected_bytes} bytes, found {more}. {_REMEDY}")
    return np.frombuffer(data, np.uint8, offset=header_bytes).reshape(shape)


def download_fashion_mnist(base_url: str = PUBLIC_URL, folder: str | Path | None = None) -> Path:
    """Fetch the four files (31 MB) and verify them. Files that are already there and right are not fetched again.

    Args:
        base_url: Where ``train-images-idx3-ubyte.gz`` and the others are: http, https or file. A mirror needs no trust:
            the contents are checked against SHA-256.
        folder: Where to put them; None is the user's cache, where ``load_fashion_mnist`` looks.

    Returns:
        The folder.

    Raises:
        ConfigError: Another scheme than those.
        DataError: The server did not deliver, or delivered something else. Nothing wrong is left in the folder.
    """
    if not base_url.startswith(("http://", "https://", "file://")):
        raise ConfigError(f"Expected a base_url with http, https or file, found {base_url!r}.")
    target = _cache_folder() if folder is None else Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    for name, (shape, sha256) in FILES.items():
        path = target / f"{name}.gz"
        if path.exists():
            try:
                read_idx(path, shape, sha256)
                continue
            except DataError:
                pass  # damaged or another data set: fetched again and replaced below
        url = f"{base_url.rstrip('/')}/{name}.gz"
        with tempfile.TemporaryDirectory(dir=target, prefix=".download-") as temporary:
            part = Path(temporary) / path.name
            _fetch(url, part)
            try:
                read_idx(part, shape, sha256)
            except DataError as error:
                raise DataError(f"{url} is not the file it should be: {error}") from error
            part.replace(path)
    return target


def _fetch(url: str, path: Path) -> None:
    try:
        with urllib.request.urlopen(url, timeout=_DOWNLOAD_TIMEOUT_S) as reply, path.open("wb") as out:
            fetched = 0
            while chunk := reply.read(1 << 16):
                fetched += len(chunk)
                if fetched > _DOWNLOAD_LIMIT_BYTES:
                    raise DataError(f"{url}: expected at most {_DOWNLOAD_LIMIT_BYTES} bytes, and there are more.")
                out.write(chunk)
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise DataError(
            f"{url} could not be fetched ({error}). Check the address and the network, "
            "or install it with `apt-get install dataset-fashion-mnist`."
        ) from error


def _find(names: tuple[str, ...], folder: str | Path | None) -> list[Path]:
    if folder is not None:
        searched = [Path(folder)]
    else:
        own = os.environ.get("EFFTRAIN_DATA")
        searched = [Path(own) / "fashion-mnist", Path(own)] if own else []
        searched += [DEBIAN_FOLDER, _cache_folder()]
    for place in searched:
        paths = [_with_or_without_gz(place / name) for name in names]
        complete = [path for path in paths if path is not None]
        if len(complete) == len(names):
            return complete
    listed = ", ".join(str(place) for place in searched)
    raise DataError(f"Fashion-MNIST: expected {' and '.join(names)} (.gz or not) in one of: {listed}. {_REMEDY}")


def _with_or_without_gz(path: Path) -> Path | None:
    for candidate in (path, path.with_name(f"{path.name}.gz")):
        if candidate.is_file():
            return candidate
    return None


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "efftrain" / "fashion-mnist"

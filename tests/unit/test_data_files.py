"""Corrupt, truncated and wrong files end in one DataError that names file, expected, found and remedy."""

import contextlib
import gzip
import hashlib
import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efftrain.data.fashion_mnist import (
    FILES,
    PUBLIC_URL,
    download_fashion_mnist,
    load_fashion_mnist,
    parse_idx,
    read_idx,
)
from efftrain.data.shipped import FILES as SHIPPED_FOLDER
from efftrain.data.shipped import SHIPPED, Member, load_shipped, read_npz
from efftrain.errors import ConfigError, DataError

MEMBERS = {"a": Member("int16", (3, 4)), "b": Member("float32", (None,))}


def npz_bytes(**arrays: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]
    return stream.getvalue()


def good() -> bytes:
    return npz_bytes(a=np.arange(12, dtype=np.int16).reshape(3, 4), b=np.ones(5, np.float32))


def zip_of(**members: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return stream.getvalue()


def npy_header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def read(tmp_path: Path, data: bytes) -> dict[str, np.ndarray]:
    path = tmp_path / "data.npz"
    path.write_bytes(data)
    return read_npz(path, MEMBERS, remedy="Make it again.")


def test_reads_what_numpy_wrote(tmp_path: Path) -> None:
    arrays = read(tmp_path, good())
    assert arrays["a"].tolist() == np.arange(12).reshape(3, 4).tolist()
    assert arrays["b"].tolist() == [1.0] * 5


B = npz_bytes(b=np.ones(5, np.float32))

HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "do not parse"),
    "not a zip": (lambda: b"hello" * 100, "do not parse"),
    "truncated": (lambda: good()[:-30], "do not parse"),
    "missing member": (lambda: npz_bytes(a=np.zeros((3, 4), np.int16)), r"expected the members \['a.npy', 'b.npy'\]"),
    "extra member": (
        lambda: npz_bytes(a=np.zeros((3, 4), np.int16), b=np.ones(1, np.float32), c=np.ones(1)),
        "expected the members",
    ),
    "wrong dtype": (
        lambda: npz_bytes(a=np.zeros((3, 4), np.int32), b=np.ones(1, np.float32)),
        "array a: expected int16 in C order, found int32",
    ),
    "wrong shape": (
        lambda: npz_bytes(a=np.zeros((4, 3), np.int16), b=np.ones(1, np.float32)),
        r"array a: expected shape \(3, 4\), found \(4, 3\)",
    ),
    "wrong rank": (
        lambda: npz_bytes(a=np.zeros((3, 4, 1), np.int16), b=np.ones(1, np.float32)),
        "array a: expected shape",
    ),
    "Fortran order": (
        lambda: npz_bytes(a=np.asfortranarray(np.zeros((3, 4), np.int16)), b=np.ones(1, np.float32)),
        "Fortran order",
    ),
    "pickled": (
        lambda: npz_bytes(a=np.array([[{}]], object), b=np.ones(1, np.float32)),
        "array a: expected int16 in C order, found object",
    ),
    "wrong magic": (lambda: zip_of(a=b"\x93NUMPX\x01\x00" + b" " * 90, b=b""), "do not parse"),
    "unknown version": (lambda: zip_of(a=b"\x93NUMPY\x09\x00" + b" " * 90, b=b""), "expected .npy version"),
    "oversized header": (lambda: zip_of(a=npy_header("{" + " " * 60000 + "}"), b=b""), "do not parse"),
    "unbalanced header": (lambda: zip_of(a=npy_header("{'descr': (('" + "\n"), b=b""), "do not parse"),
    "huge shape": (
        lambda: zip_of(
            a=npy_header("{'descr': '<i2', 'fortran_order': False, 'shape': (3, 4)}\n") + bytes(24),
            b=(npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999,)}\n")),
        ),
        "array b: expected shape",
    ),
    "negative shape": (
        lambda: zip_of(
            a=npy_header("{'descr': '<i2', 'fortran_order': False, 'shape': (3, 4)}\n") + bytes(24),
            b=(npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}\n")),
        ),
        "array b: expected shape",
    ),
    "short data": (
        lambda: zip_of(a=npy_header("{'descr': '<i2', 'fortran_order': False, 'shape': (3, 4)}\n") + bytes(23), b=b""),
        "array a: expected 24 bytes of data, found 23",
    ),
    "long data": (
        lambda: zip_of(a=npy_header("{'descr': '<i2', 'fortran_order': False, 'shape': (3, 4)}\n") + bytes(25), b=b""),
        "array a: expected 24 bytes of data, found more",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_archives_end_in_one_error(tmp_path: Path, case: str) -> None:
    make, message = HOSTILE[case]
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path, make())
    assert str(caught.value).startswith(str(tmp_path / "data.npz"))
    assert str(caught.value).endswith("Make it again.")


def test_a_zip_bomb_is_not_inflated(tmp_path: Path) -> None:
    head = npy_header("{'descr': '<i2', 'fortran_order': False, 'shape': (3, 4)}\n")
    data = zip_of(a=head + bytes(50_000_000), b=b"")
    assert len(data) < 100_000
    with pytest.raises(DataError, match="found more"):
        read(tmp_path, data)


@settings(max_examples=200, deadline=None)
@given(position=st.integers(0, 10_000), bit=st.integers(0, 7), cut=st.integers(0, 10_000))
def test_mutated_archives_parse_or_end_in_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, position: int, bit: int, cut: int
) -> None:
    data = bytearray(good())
    data[position % len(data)] ^= 1 << bit
    path = tmp_path_factory.mktemp("npz") / "data.npz"
    path.write_bytes(bytes(data[: max(1, len(data) - cut % 40)]))
    try:
        arrays = read_npz(path, MEMBERS)
    except DataError:
        return
    assert arrays["a"].shape == (3, 4)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_files_are_as_stated(name: str) -> None:
    data = (SHIPPED_FOLDER / name).read_bytes()
    assert len(data) == SHIPPED[name].num_bytes
    assert hashlib.sha256(data).hexdigest() == SHIPPED[name].sha256
    assert set(load_shipped(name)) == set(SHIPPED[name].members)


def test_a_flipped_bit_in_a_shipped_file_is_found(tmp_path: Path) -> None:
    data = bytearray((SHIPPED_FOLDER / "digits.npz").read_bytes())
    data[20_000] ^= 1
    (tmp_path / "digits.npz").write_bytes(data)
    with pytest.raises(DataError, match=r"digits\.npz: expected SHA-256 b2dab.*found.*Reinstall efftrain"):
        load_shipped("digits.npz", tmp_path)


def test_a_truncated_and_a_missing_shipped_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"digits\.npz: cannot be read.*Reinstall efftrain"):
        load_shipped("digits.npz", tmp_path)
    (tmp_path / "digits.npz").write_bytes(b"short")
    with pytest.raises(DataError, match=r"expected 45394 bytes, found 5\."):
        load_shipped("digits.npz", tmp_path)


def test_notice_names_every_shipped_file() -> None:
    notice = (SHIPPED_FOLDER / "NOTICE.md").read_text()
    assert all(name in notice for name in SHIPPED)
    assert notice.count("Redistribution and use in source and binary forms") == 2


IDX = bytes((0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3)) + bytes(range(6))


def test_idx_is_read_compressed_or_not(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(IDX)
    (tmp_path / "x.gz").write_bytes(gzip.compress(IDX))
    for name in ("x", "x.gz"):
        assert read_idx(tmp_path / name, (2, 3)).tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "expected the idx magic 00000802, found nothing"),
        (b"\x00\x00\x08\x03" + IDX[4:], "expected the idx magic 00000802, found 00000803"),
        (IDX[:7], "expected a header of 12 bytes, found 7 bytes"),
        (bytes((0, 0, 8, 2, 255, 255, 255, 255)) + IDX[8:], r"expected dimensions \(2, 3\), found \(4294967295, 3\)"),
        (IDX[:-1], "expected 18 bytes, found 17"),
        (IDX + b"\x00", "expected 18 bytes, found more"),
    ],
)
def test_wrong_idx_bytes_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        parse_idx(data, (2, 3), what="file")
    assert "apt-get install dataset-fashion-mnist" in str(caught.value)


@given(st.binary(max_size=40))
def test_any_bytes_are_an_array_or_a_data_error(data: bytes) -> None:
    with contextlib.suppress(DataError):
        assert parse_idx(data, (2, 3)).shape == (2, 3)


@pytest.mark.parametrize("cut", [1, 8, 9, 15])
def test_a_truncated_gzip_is_refused(tmp_path: Path, cut: int) -> None:
    (tmp_path / "x.gz").write_bytes(gzip.compress(IDX)[:-cut])
    with pytest.raises(DataError, match=r"x\.gz: expected a whole gzip file"):
        read_idx(tmp_path / "x.gz", (2, 3))


def test_a_gzip_bomb_is_not_inflated(tmp_path: Path) -> None:
    (tmp_path / "x.gz").write_bytes(gzip.compress(IDX + bytes(50_000_000)))
    with pytest.raises(DataError, match="found more"):
        read_idx(tmp_path / "x.gz", (2, 3))


def test_a_checksum_is_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(IDX)
    assert read_idx(tmp_path / "x", (2, 3), hashlib.sha256(IDX).hexdigest()).shape == (2, 3)
    with pytest.raises(DataError, match="expected SHA-256 0000"):
        read_idx(tmp_path / "x", (2, 3), "0" * 64)


def fake_idx(name: str) -> bytes:
    shape = FILES[name][0]
    header = bytes((0, 0, 8, len(shape))) + b"".join(size.to_bytes(4, "big") for size in shape)
    return header + bytes(int(np.prod(shape)))


def test_another_data_set_of_the_right_form_is_refused(tmp_path: Path) -> None:
    for name in ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(fake_idx(name), 1))
    with pytest.raises(DataError, match=r"t10k-images.*expected SHA-256 5b4141f0"):
        load_fashion_mnist("test", tmp_path)


def test_missing_files_name_the_places_and_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte and t10k-labels.*apt-get install") as caught:
        load_fashion_mnist("test", tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_download_is_verified_and_leaves_nothing_wrong_behind(tmp_path: Path) -> None:
    served = tmp_path / "served"
    served.mkdir()
    target = tmp_path / "target"
    with pytest.raises(DataError, match="could not be fetched"):
        download_fashion_mnist(served.as_uri(), target)
    (served / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"not an idx file"))
    with pytest.raises(DataError, match="is not the file it should be"):
        download_fashion_mnist(served.as_uri(), target)
    assert list(target.iterdir()) == []
    with pytest.raises(ConfigError, match="http, https or file"):
        download_fashion_mnist("ftp://host/", target)
    assert PUBLIC_URL.startswith("http://fashion-mnist.s3-website")

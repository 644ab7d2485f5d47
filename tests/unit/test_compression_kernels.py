"""Building the kernels on first use: what happens on machines that cannot, and on those that do it twice at once."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from efftrain.compression import Int8, kernels
from efftrain.compression.kernels import build

STRICT = ("-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-Wdouble-promotion", "-Wvla", "-Werror", "-pedantic")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("EFFTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("EFFTRAIN_KERNELS", raising=False)
    build._load.cache_clear()
    yield
    build._load.cache_clear()


def need_compiler() -> None:
    if not build.compilers():
        pytest.skip("no C compiler on this machine")


def encode() -> bytes:
    return bytes(Int8(block=3).encode(np.arange(7, dtype=np.float32)))


def test_built_once_and_found_again(tmp_path: Path) -> None:
    need_compiler()
    assert kernels.why_not() is None
    found = kernels.available()
    assert found is not None
    [path] = (tmp_path / "cache" / "kernels").iterdir()  # and no build folder is left
    assert str(path) in found
    built = path.stat().st_mtime_ns
    build._load.cache_clear()
    assert kernels.available() == found
    assert path.stat().st_mtime_ns == built


def test_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    with_kernels = encode()
    monkeypatch.setenv("EFFTRAIN_KERNELS", "off")
    assert kernels.available() is None
    assert kernels.why_not() == "EFFTRAIN_KERNELS=off is set; unset it"
    assert encode() == with_kernels


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "compilers", list)
    assert kernels.available() is None
    assert kernels.why_not() == "no C compiler was found; install gcc or clang, or `pip install ziglang`"
    assert len(encode()) == Int8(block=3).encoded_bytes(7)


def test_compiler_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import sys; sys.exit('no such option')"
    monkeypatch.setattr(build, "compilers", lambda: [(sys.executable, "-c", script)])
    assert kernels.available() is None
    assert "failed: no such option" in str(kernels.why_not())
    assert len(encode()) == Int8(block=3).encoded_bytes(7)


def test_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    need_compiler()
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("EFFTRAIN_CACHE", str(tmp_path / "file"))
    assert kernels.available() is None
    assert str(kernels.why_not()).endswith("set EFFTRAIN_CACHE to a folder of yours")
    assert len(encode()) == Int8(block=3).encoded_bytes(7)


def test_a_library_that_others_may_write_is_not_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    need_compiler()
    first = build.compilers()[:1]
    monkeypatch.setattr(build, "compilers", lambda: first)
    assert kernels.available() is not None
    [path] = (tmp_path / "cache" / "kernels").iterdir()
    path.chmod(0o777)
    build._load.cache_clear()
    assert kernels.available() is None
    assert "others may write to it" in str(kernels.why_not())


def test_two_processes_at_once(tmp_path: Path) -> None:
    need_compiler()
    script = "from efftrain.compression import kernels; print(kernels.available())"
    both = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=os.environ.copy())
        for _ in range(2)
    ]
    said = [process.communicate(timeout=200)[0].strip() for process in both]
    assert said[0] == said[1] != "None"
    assert len(list((tmp_path / "cache" / "kernels").iterdir())) == 1


def test_sources_are_clean_and_need_nothing(tmp_path: Path) -> None:
    """No warning, one function a file named like it, no heap, no stdio."""
    need_compiler()
    build.compile_library(build.compilers()[0], tmp_path / "strict.so", STRICT)
    header = (build.SOURCES / "efc.h").read_text()
    for source in build.SOURCES.glob("*.c"):
        text = source.read_text()
        assert re.findall(r"^(?!static)\w[\w ]*\b(\w+)\(", text, re.MULTILINE) == [source.stem]
        assert f" {source.stem}(" in header
        assert not re.search(r"\b(malloc|calloc|free|printf|stdio)\b", text)


def test_importing_codecs_builds_nothing(tmp_path: Path) -> None:
    script = "import sys, efftrain.compression; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, env=os.environ.copy(), timeout=200)
    assert not (tmp_path / "cache").exists()

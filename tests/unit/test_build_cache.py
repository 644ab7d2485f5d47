"""The cache of compiled code: what is used stays, what nobody asked for in a month goes."""

import os
import time
from pathlib import Path

import pytest

from efftrain.ondevice.backends.toolchain import build, forget_unused, host_toolchain

MONTH_S = 31 * 24 * 3600


def age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_builds_that_nobody_used_for_a_month_are_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFFTRAIN_CACHE", str(tmp_path))

    def built(number: int) -> Path:
        return build(
            host_toolchain(), {"one.c": f"int one(void);\nint one(void) {{ return {number}; }}\n"}, "libone.so"
        )

    old, used = built(1), built(2)
    folder = tmp_path / "ondevice"
    for entry in folder.glob("*/*"):
        age(entry, MONTH_S)
    assert built(2) == used  # which makes it young again
    new = built(3)
    assert old.exists(), "looked twice in a day"
    age(folder / ".looked", MONTH_S)
    forget_unused(folder)
    assert [path.exists() for path in (old, used, new)] == [False, True, True]
    assert len(list(folder.glob("*/*"))) == 4  # an object and a library of each
    assert built(1).exists()

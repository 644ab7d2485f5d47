"""Compile the kernels on first use, keep them in the user's cache, load them.

The cache is keyed by everything that goes into the library: sources, compiler, options and, since it is built for this
very CPU, what the CPU can do (a home folder may be shared by a cluster). Each build happens in a folder of its own and
is renamed into place, so two processes may build at once. A library is loaded from a folder of this user only that
nobody else may write to.
"""

import ctypes
import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SOURCES = Path(__file__).parent
FLAGS = (
    "-std=c11",
    "-O3",
    "-ffp-contract=off",  # a fused multiply-add rounds once where NumPy rounds twice
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-sanitize=all",  # zig's default traps; the tests build with sanitizers of their own
    "-fPIC",
    "-shared",
)
_TIMEOUT_S = 120


def available() -> str | None:
    """Where the compiled kernels are and what built them, or ``None`` if codecs run on NumPy; see ``why_not``."""
    return None if _switched_off() or library() is None else _load()[1]


def why_not() -> str | None:
    """Why codecs run on NumPy and what to do about it; ``None`` if they run on compiled kernels."""
    if _switched_off():
        return "EFFTRAIN_KERNELS=off is set; unset it"
    return None if library() is not None else _load()[1]


def library() -> ctypes.CDLL | None:
    """The compiled kernels; ``None`` if there are none or ``EFFTRAIN_KERNELS=off`` is set."""
    return None if _switched_off() else _load()[0]


def compilers() -> list[tuple[str, ...]]:
    """Commands that may compile C for this machine, best first."""
    found: list[tuple[str, ...]] = [(path,) for name in ("cc", "gcc", "clang") if (path := shutil.which(name))]
    if importlib.util.find_spec("ziglang") is not None:
        found.append((sys.executable, "-m", "ziglang", "cc"))
    return found


def compile_library(command: tuple[str, ...], output: Path, extra: tuple[str, ...] = ()) -> None:
    """Compile all kernels into one shared library.

    Raises:
        OSError: The compiler cannot be started.
        subprocess.SubprocessError: It failed or took minutes.
    """
    sources = [str(path) for path in sorted(SOURCES.glob("*.c"))]
    subprocess.run(
        [*command, *FLAGS, *_for_this_cpu(), *extra, *sources, "-o", str(output)],
        check=True,
        capture_output=True,
        timeout=_TIMEOUT_S,
        cwd=output.parent,
    )


_SWITCH = "EFFTRAIN_KERNELS"
_SWITCH_KEY = os.environ.encodekey(_SWITCH)
_VARIABLES: Any = getattr(os.environ, "_data", {_SWITCH_KEY: ""})


def _switched_off() -> bool:
    # Asked at every call of a kernel. ``os.environ.get`` of a variable that is not there raises and catches inside: as
    # long as a small tensor takes. So the dict behind it is asked first, if this Python has it.
    return _SWITCH_KEY in _VARIABLES and os.environ.get(_SWITCH, "").lower() in ("off", "0", "false", "no")


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library and where it is from, or ``None`` and why there is none. Once a process."""
    if sys.byteorder != "little" or sys.platform == "win32":
        return None, f"the kernels are not made for {sys.platform} on a {sys.byteorder}-endian machine"
    candidates = compilers()
    if not candidates:
        return None, "no C compiler was found; install gcc or clang, or `pip install ziglang`"
    problem = ""
    for command in candidates:
        try:
            path = _built(command)
            return ctypes.CDLL(str(path)), f"{path} ({' '.join(command)})"
        except subprocess.SubprocessError as error:
            errors = getattr(error, "stderr", None) or b""
            said = errors.decode(errors="replace").strip().splitlines()
            problem = f"{' '.join(command)} failed: {said[0] if said else error}"
        except OSError as error:
            problem = f"{error}; set EFFTRAIN_CACHE to a folder of yours"
    return None, problem


def _built(command: tuple[str, ...]) -> Path:
    """Path of the library, built if the cache does not have it."""
    folder = _cache_folder()
    path = folder / f"efc-{_key(command)}.so"
    if not path.exists():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".build-", dir=folder) as build:
            output = Path(build) / path.name
            compile_library(command, output)
            output.replace(path)
    for place in (folder, path):
        status = place.stat()
        if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise PermissionError(f"{place} belongs to another user or others may write to it")
    return path


def _cache_folder() -> Path:
    if chosen := os.environ.get("EFFTRAIN_CACHE"):
        return Path(chosen) / "kernels"
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:  # no home folder
        raise OSError(str(error)) from error
    return home / "efftrain" / "kernels"


def _key(command: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for path in sorted(SOURCES.glob("*.[ch]")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    compiler = Path(command[0]).resolve()
    digest.update(repr((command, compiler.stat().st_size, FLAGS, _for_this_cpu(), _cpu())).encode())
    return digest.hexdigest()[:32]


def _for_this_cpu() -> tuple[str, ...]:
    return ("-march=native",) if _cpu() else ()


@functools.cache
def _cpu() -> str:
    """What the CPU can do, as the kernel tells; empty where it does not, and the build is then a portable one."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    told = sorted({line for line in lines if line.split(":")[0].strip() in wanted})
    return "\n".join([platform.machine(), *told]) if told else ""

"""Compilers: the system's or zig's for the host; arm-none-eabi-gcc, riscv64-unknown-elf-gcc or zig's for boards.

Objects and libraries are cached under the hash of everything that goes into them. Each is built in a folder of its
own and moved into place whole, so two processes may build the same thing at once. What nobody asked for in a month is
deleted: federated rounds in integers build a program for every model that the server sends.
"""

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from efftrain.errors import BudgetError, ToolError
from efftrain.ondevice.target import Cpu, family_of

WARNINGS = ("-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-Wdouble-promotion", "-Wvla", "-Werror")
_COMMON = ("-std=c99", *WARNINGS, "-fno-strict-aliasing")
Kind = Literal["auto", "gcc", "zig"]
_DAY_S = 24 * 3600.0
_KEPT_S = 30 * _DAY_S


@dataclass(frozen=True, slots=True)
class Toolchain:
    """A compiler driver and the options that make it build for one target."""

    name: str
    command: tuple[str, ...]
    compile_flags: tuple[str, ...]
    link_flags: tuple[str, ...]


def host_toolchain(kind: Kind = "auto") -> Toolchain:
    """A C compiler for this machine.

    Args:
        kind: ``gcc`` for the system's own compiler, whatever it is called, ``zig``, or ``auto``: the first of them.

    Raises:
        ToolError: There is none.
    """
    system = next((path for name in ("gcc", "cc", "clang") if (path := shutil.which(name))), None)
    # The flags are part of the key of the cache: a library is not found by a machine that lacks its instructions.
    flags = (*_COMMON, "-O3", "-fPIC", "-fno-sanitize=all", *host_instructions())
    if kind != "zig" and system:
        return Toolchain("system", (system,), flags, ("-shared",))
    if kind != "gcc" and _has_zig():
        # Left to itself, zig builds for this very processor, whatever the cache is shared with.
        return Toolchain("zig", (sys.executable, "-m", "ziglang", "cc"), ("-mcpu=baseline", *flags), ("-shared",))
    raise ToolError(
        "no C compiler for this machine was found. Install gcc or clang from your system's packages, "
        "or `pip install 'efftrain[board]'`, which brings one."
    )


@cache
def host_instructions() -> tuple[str, ...]:
    """Compiler options for what this processor has beyond the least of its kind, as far as kernels use it."""
    try:
        told = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return ()
    has_avx2 = any("avx2" in line.split() for line in told.splitlines() if line.startswith("flags"))
    return ("-mavx2",) if has_avx2 else ()


def board_toolchain(cpu: Cpu, kind: Kind = "auto") -> Toolchain:
    """A cross compiler. All code is built for the soft-float interface, so that no floating point can be used unseen.

    Raises:
        ToolError: There is none.
    """
    family = family_of(cpu)
    gcc = shutil.which(family.gcc)
    common = (*_COMMON, "-O2", "-ffreestanding", "-fno-builtin", "-ffunction-sections")
    link = ("-nostdlib", "-Wl,--gc-sections")
    if kind != "zig" and gcc:
        machine = family.gcc_flags(cpu)
        graph = "-fcallgraph-info=su"
        return Toolchain(family.gcc, (gcc,), (*common, graph, *machine), (*machine, *link, "-lgcc"))
    if kind != "gcc" and _has_zig():
        machine = family.zig_flags(cpu)
        command = (sys.executable, "-m", "ziglang", "cc")
        return Toolchain(
            "zig",
            command,
            (*common, *machine, "-fno-sanitize=all", "-fno-unroll-loops"),
            (*machine, *link, "-O2", "-lcompiler_rt"),
        )
    raise ToolError(
        f"no compiler for {family.name} was found. `pip install 'efftrain[board]'` brings one (zig); or install "
        f"{family.gcc}, for example with `apt install {family.package}`."
    )


def build(
    toolchain: Toolchain, sources: Mapping[str, str], output: str, extra: Sequence[str] = (), script: str = ""
) -> Path:
    """Compile and link.

    Args:
        toolchain: What with.
        sources: Text by file name, headers included.
        output: File name of the result.
        extra: More options for compiling and linking.
        script: Text of a linker script.

    Returns:
        Path of the result in the cache. Beside it lie ``<source>.ci`` files if the compiler wrote its call graph.

    Raises:
        ToolError: The compiler failed; the message has its first lines.
        BudgetError: The linker says that a memory region is too small.
    """
    objects = compile_objects(toolchain, sources, extra)
    key = _key(toolchain, [str(path) for path in objects], script, output, *extra)

    def link(folder: Path) -> None:
        options = [*toolchain.link_flags, *extra]
        libraries = [option for option in options if option.startswith("-l")]
        options = [option for option in options if option not in libraries]
        if script:
            (folder / "board.ld").write_text(script)
            options += ["-T", str(folder / "board.ld")]
        _run(
            [
                *toolchain.command,
                *options,
                *(str(o / "out.o") for o in objects),
                *libraries,
                "-o",
                str(folder / output),
            ],
            folder,
        )
        for number, path in enumerate(objects):
            for graph in path.glob("*.ci"):
                shutil.copyfile(graph, folder / f"{number}-{graph.name}")

    return _cached("link", key, link) / output


def compile_objects(toolchain: Toolchain, sources: Mapping[str, str], extra: Sequence[str] = ()) -> list[Path]:
    """Compile every ``.c`` file of ``build``'s sources that is not in the cache, as many at a time as there are cores.

    Returns:
        A folder in the cache for each, in their order, with ``out.o`` in it.

    Raises:
        ToolError: The compiler failed; the message has its first lines.
    """
    headers = {name: text for name, text in sources.items() if name.endswith(".h")}
    files = [(name, text) for name, text in sources.items() if name.endswith(".c")]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(threads.map(lambda file: _object(toolchain, file[0], file[1], headers, extra), files))


def cache_folder() -> Path:
    """Where builds are kept: ``EFFTRAIN_CACHE``, else ``XDG_CACHE_HOME`` or ``~/.cache`` with ``efftrain`` "
    "behind it."""
    if chosen := os.environ.get("EFFTRAIN_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "efftrain"


def _object(toolchain: Toolchain, name: str, text: str, headers: Mapping[str, str], extra: Sequence[str]) -> Path:
    included = {header: body for header, body in headers.items() if _includes(text, header, headers)}
    key = _key(toolchain, name, text, *sorted(included.items()), *extra)

    def compile_one(folder: Path) -> None:
        for file, body in {**included, name: text}.items():
            (folder / file).write_text(body)
        compiling = [option for option in extra if not option.startswith(("-Wl,", "-l"))]
        _run([*toolchain.command, *toolchain.compile_flags, *compiling, "-c", name, "-o", "out.o"], folder)
        graph = folder / "out.ci"
        if graph.exists():
            graph.rename(folder / f"{Path(name).stem}.ci")

    return _cached("object", key, compile_one)


def _includes(text: str, header: str, headers: Mapping[str, str]) -> bool:
    """Whether a file includes a header, itself or through another."""
    direct = [name for name in headers if f'#include "{name}"' in text]
    return header in direct or any(_includes(headers[name], header, headers) for name in direct)


def _cached(kind: str, key: str, make: Callable[[Path], None]) -> Path:
    target = cache_folder() / "ondevice" / kind / key
    if target.is_dir():
        with contextlib.suppress(OSError):  # a cache that this user may only read
            os.utime(target)
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    forget_unused(cache_folder() / "ondevice")
    folder = Path(tempfile.mkdtemp(prefix=f".{key[:8]}-", dir=target.parent))
    try:
        make(folder)
        try:
            folder.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was faster, and its result is the same
                raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return target


def forget_unused(folder: Path) -> None:
    """Delete what lies in the folders of a folder and was not used for a month. Looks once a day."""
    looked, now = folder / ".looked", time.time()
    with contextlib.suppress(FileNotFoundError):
        if now - looked.stat().st_mtime < _DAY_S:
            return
    looked.touch()
    for entry in folder.glob("*/*"):
        with contextlib.suppress(FileNotFoundError):  # another process looks as well
            if now - entry.stat().st_mtime > _KEPT_S:
                shutil.rmtree(entry, ignore_errors=True)


def _key(toolchain: Toolchain, *parts: object) -> str:
    content = repr((toolchain, _version(toolchain.command), parts))
    return hashlib.sha256(content.encode()).hexdigest()[:40]


@cache
def _version(command: tuple[str, ...]) -> str:
    if "ziglang" in command:
        return importlib.metadata.version("ziglang")
    result = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    return result.stdout.splitlines()[0] if result.stdout else ""


def _run(command: Sequence[str], folder: Path) -> None:
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode == 0:
        return
    message = (result.stderr or result.stdout).strip()
    if "overflowed by" in message or "will not fit in region" in message or "region 'RAM'" in message:
        line = next((text for text in message.splitlines() if "region" in text), message.splitlines()[0])
        raise BudgetError(
            f"the linker refuses the firmware: {line.strip()}. Choose a smaller scheme or a larger board."
        )
    lines = "\n".join(message.splitlines()[:8])
    raise ToolError(f"{Path(command[0]).name} failed on code that this library generated:\n{lines}")


@cache
def _has_zig() -> bool:
    return importlib.util.find_spec("ziglang") is not None

"""Compilers that generated C has to please, beside those that this library builds with."""

import platform
import shutil
import sys
from pathlib import Path

from efftrain.ondevice.backends.toolchain import Toolchain

WARNINGS = "-std=c99 -Wall -Wextra -Wconversion -Wshadow -Wdouble-promotion -Wvla -Werror".split()  # noqa: SIM905
SANITIZERS = ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-std=c99")


def _strict(name: str, command: tuple[str, ...], *flags: str) -> Toolchain:
    return Toolchain(name, command, ("-O2", *flags, *WARNINGS), ())


ZIG = (sys.executable, "-m", "ziglang", "cc")
COMPILERS = {
    "gcc": _strict("gcc", ("gcc",)),
    "zig": _strict("zig", ZIG),
    "zig-arm": _strict("zig-arm", ZIG, "-target", "thumb-freestanding-eabi", "-mcpu=cortex_m4", "-ffreestanding"),
}
if platform.machine() == "x86_64":
    COMPILERS["gcc-avx2"] = _strict("gcc-avx2", ("gcc",), "-mavx2")
if shutil.which("arm-none-eabi-gcc"):  # CI has it; the board extra alone brings zig
    for cpu in ("m4", "m0plus", "m33", "m55"):
        flags = (f"-mcpu=cortex-{cpu}", "-mthumb", "-ffreestanding")
        COMPILERS[f"arm-gcc-{cpu}"] = _strict(f"arm-gcc-{cpu}", ("arm-none-eabi-gcc",), *flags)


def sanitized(*instructions: str) -> Toolchain:
    """A host compiler whose programs end with a report at the first undefined thing that they do."""
    return Toolchain("sanitizers", ("gcc",), (*SANITIZERS, *instructions), SANITIZERS)


def sources(folder: Path) -> dict[str, str]:
    """The C files of a folder, as ``toolchain.build`` takes them."""
    return {path.name: path.read_text() for path in sorted(folder.glob("*.[ch]"))}

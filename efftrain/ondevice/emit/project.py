"""Everything of a program as files: for a user's own build, for the host library and for firmware."""

from pathlib import Path
from string import Template

from efftrain.ondevice.constants import Number
from efftrain.ondevice.emit.c_source import CSource
from efftrain.ondevice.emit.names import safe
from efftrain.ondevice.memory import MemoryPlan
from efftrain.ondevice.target import Board, Family, family_of
from efftrain.units import format_bytes, format_count

RUNTIME = Path(__file__).parent.parent / "runtime"
_TEMPLATES = Path(__file__).parent / "templates"


def runtime_sources() -> dict[str, str]:
    """The kernels, by file name, headers included."""
    return {path.name: path.read_text() for path in sorted(RUNTIME.glob("*.[ch]"))}


def template(file: str, **values: str | int) -> str:
    """A file of ``templates/`` with its fields filled in."""
    return Template((_TEMPLATES / file).read_text()).substitute(values)


def firmware_sources(name: str, code: CSource) -> dict[str, str]:
    """All C files of the firmware, by file name."""
    return {
        **runtime_sources(),
        f"{name}.h": code.header,
        f"{name}.c": code.source,
        "startup.c": (_TEMPLATES / "startup.c").read_text(),
        "driver.c": template("driver.c", name=name, NAME=name.upper()),
    }


def linker_script(board: Board, plan: MemoryPlan) -> str:
    """A script whose memory regions are the board's, no byte more."""
    return template(
        "board.ld",
        board=safe(board.name),
        ram_bytes=board.ram_bytes,
        ram_origin=hex(board.ram_origin),
        flash_bytes=board.flash_bytes,
        flash_origin=hex(board.flash_origin),
        stack_bytes=plan.stack_bytes,
    )


def write_project(
    folder: Path, name: str, code: CSource, plan: MemoryPlan, board: Board, scheme: str, number: Number
) -> None:
    """A self-contained folder: program, kernels, an example and what it costs."""
    folder.mkdir(parents=True, exist_ok=True)
    family = family_of(board.cpu)
    toolchain = _toolchain_file(family)
    files = {
        **runtime_sources(),
        f"{name}.h": code.header,
        f"{name}.c": code.source,
        "main.c": template("main.c" if code.copies_input else "main_in_place.c", name=name, NAME=name.upper()),
        "startup.c": (_TEMPLATES / "startup.c").read_text(),
        "board.ld": linker_script(board, plan),
        "CMakeLists.txt": template(
            "CMakeLists.txt",
            name=name,
            board=safe(board.name),
            kernels="\n    ".join(_kernel_files()),
            toolchain=toolchain,
        ),
        toolchain: template(
            "toolchain.cmake",
            board=safe(board.name),
            cpu=board.cpu,
            gcc=family.gcc,
            machine=" ".join(family.gcc_flags(board.cpu)),
        ),
        "README.md": _readme(name, plan, board, scheme, number),
    }
    for file, text in files.items():
        (folder / file).write_text(text)


def _toolchain_file(family: Family) -> str:
    return f"{family.gcc.removesuffix('-gcc')}.cmake"


def _kernel_files() -> list[str]:
    return [name for name in runtime_sources() if name.endswith(".c")]


def _readme(name: str, plan: MemoryPlan, board: Board, scheme: str, number: Number) -> str:
    rows = {
        "arena": plan.arena_bytes,
        "trained state": plan.trained_state_bytes,
        "stack (reserved)": plan.stack_bytes,
        "static": plan.static_bytes,
        "**RAM, all of it**": plan.total_ram_bytes,
        "flash (constants, and an allowance for code)": plan.flash_bytes,
    }
    table = "\n".join(f"| {part} | {num_bytes:,} B |" for part, num_bytes in rows.items())
    common = "-std=c99 -O2 -ffreestanding -nostdlib -ffunction-sections -Wl,--gc-sections -T board.ld *.c"
    family = family_of(board.cpu)
    toolchain = _toolchain_file(family)
    gcc = f"{family.gcc} {' '.join(family.gcc_flags(board.cpu))} {common} -lgcc -o {name}.elf"
    flags = " ".join(family.zig_flags(board.cpu))
    zig = f"{flags} {common} -lcompiler_rt -Wl,-e,Reset_Handler -o {name}.elf"
    where = safe(board.name)
    return f"""\
# {name}: a model that trains on {where}

Made by `efftrain`, update scheme `{safe(scheme)}`. C99 without heap, stdio, recursion or floating point.

| file | is |
|---|---|
| `{name}.h`, `{name}.c` | the model; the header is the contract |
| `eft.h`, `eft_*.h`, `eft_*.c` | the kernels that it calls |
| `main.c` | an example; replace its `read_sensor` and `read_label` by what the product has |
| `startup.c` | what runs first on a bare {family.name} |
| `board.ld` | a linker script that holds the program to the board's memory |
| `CMakeLists.txt`, `{toolchain}` | both builds below, for CMake |

Inputs are int8, channel last. Of a real value, prepared as in training, the model takes
`round(real / scale)`, held to [-128, 127]: scale {number.scale!r}, zero point {number.zero_point}.
`{name}.h` has the same in integers.

With CMake, as a library for this machine, and as firmware for {where}:

    cmake -B out && cmake --build out
    cmake -B out-board -DCMAKE_TOOLCHAIN_FILE={toolchain} && cmake --build out-board

In a CMake project of your own, `add_subdirectory` this folder and link `eft_{name}`. Without CMake, the library:

    gcc -std=c99 -O2 -fPIC -shared {name}.c eft_*.c -o lib{name}.so

Firmware for {where}, with the GNU compiler or with zig (`pip install ziglang`):

    {gcc}
    python -m ziglang cc {zig}

Add `-fno-strict-aliasing` if you use link-time optimization: the arena holds buffers of several types in turn. Code of
your own that needs initialized data, more interrupts or more stack brings its own start-up file and linker script.

| memory | bytes |
|---|---|
{table}

The board has {format_bytes(board.ram_bytes)} of RAM and {format_bytes(board.flash_bytes)} of flash. The arena is
{plan.arena_gap_bytes} B above the most bytes that are alive at once ({plan.arena_lower_bound_bytes:,} B).
A prediction takes {format_count(plan.macs_forward)} multiply-adds, the backward pass and update
{format_count(plan.macs_backward)} more.
"""

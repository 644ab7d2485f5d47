"""The boards that programs are planned for. A board is data: one TOML file each in ``boards/``."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from efftrain.config.load import load_recipe
from efftrain.errors import ConfigError

Cpu = Literal["cortex-m0plus", "cortex-m4", "cortex-m7", "cortex-m33", "cortex-m55", "rv32imac"]
CpuName = Literal["m0plus", "m4", "m7", "m33", "m55", "rv32"]
CPUS: Mapping[CpuName, Cpu] = {
    "m0plus": "cortex-m0plus",
    "m4": "cortex-m4",
    "m7": "cortex-m7",
    "m33": "cortex-m33",
    "m55": "cortex-m55",
    "rv32": "rv32imac",
}
"""Processors by their short names."""


@dataclass(frozen=True, slots=True)
class Family:
    """Processors that one cross compiler builds for."""

    name: str
    gcc: str
    """Name of the GNU compiler, and of the Debian package that has it."""
    package: str
    gcc_flags: Callable[[Cpu], tuple[str, ...]]
    zig_flags: Callable[[Cpu], tuple[str, ...]]
    stack_alignment: int
    """Bytes of which the stack pointer is a multiple at a call (AAPCS; psABI of RISC-V)."""
    code_percent: int
    """Most that code takes, of what it takes on Cortex-M (``emit.code_size``)."""


# All code is built for the soft-float interface, so that no floating point can be used unseen.
_ARM = Family(
    name="Cortex-M",
    gcc="arm-none-eabi-gcc",
    package="gcc-arm-none-eabi",
    gcc_flags=lambda cpu: (f"-mcpu={cpu}", "-mthumb", "-mfloat-abi=soft"),
    zig_flags=lambda cpu: ("-target", "thumb-freestanding-eabi", f"-mcpu={cpu.replace('-', '_')}"),
    stack_alignment=8,
    code_percent=100,
)
# Small data would be addressed from a register that nobody sets, in sections of its own.
_RISCV = Family(
    name="RISC-V",
    gcc="riscv64-unknown-elf-gcc",
    package="gcc-riscv64-unknown-elf",
    gcc_flags=lambda cpu: (f"-march={cpu}", "-mabi=ilp32", "-msmall-data-limit=0"),
    zig_flags=lambda _: ("-target", "riscv32-freestanding-none", "-mcpu=generic_rv32+m+a+c", "-mabi=ilp32"),
    stack_alignment=16,
    code_percent=115,
)


def family_of(cpu: Cpu) -> Family:
    """Arm's or RISC-V's."""
    return _RISCV if cpu.startswith("rv32") else _ARM


_FOLDER = Path(__file__).parent / "boards"


@dataclass(frozen=True, kw_only=True, slots=True)
class Board:
    """Memory and processor of a board. Addresses and sizes are what the linker and the emulator enforce."""

    name: str
    cpu: Cpu
    clock_hz: int
    ram_bytes: int
    flash_bytes: int
    ram_origin: int = 0x2000_0000
    flash_origin: int = 0x0800_0000
    data_origin: int = 0x9000_0000
    """Read-only memory outside the chip from which samples come: serial flash, a sensor's window. Not RAM."""

    stack_bytes: int = 1536
    """Reserved for the deepest call of the program and one exception frame. The linker places it at the bottom of RAM,
    so that an overflow leaves the mapped memory instead of writing over data."""

    @property
    def cpu_name(self) -> CpuName:
        """The processor's short name."""
        return next(name for name, cpu in CPUS.items() if cpu == self.cpu)

    def __post_init__(self) -> None:
        if self.ram_bytes <= 0 or self.flash_bytes <= 0 or self.clock_hz <= 0:
            raise ValueError("ram_bytes, flash_bytes and clock_hz must be positive")
        alignment = family_of(self.cpu).stack_alignment
        if self.stack_bytes <= 0 or self.stack_bytes % alignment:
            raise ValueError(f"stack_bytes is {self.stack_bytes}; it must be a positive multiple of {alignment}")
        if any(origin % 4096 for origin in (self.ram_origin, self.flash_origin, self.data_origin)):
            raise ValueError("origins must be multiples of 4096")

    @classmethod
    def named(cls, name: str) -> "Board":
        """A board that ships with the library; ``names`` lists them.

        Raises:
            ConfigError: There is no such board.
        """
        if name not in cls.names():
            raise ConfigError(f"board {name!r} is not known; known are {', '.join(cls.names())}, or give a TOML file")
        return cls.load(_FOLDER / f"{name}.toml")

    @classmethod
    def load(cls, path: Path | str) -> "Board":
        """Read a board from a TOML file; unknown keys are errors.

        Raises:
            ConfigError: The file is missing, no TOML, or has an unknown key or a value out of range.
        """
        return load_recipe(cls, path, what="board file")

    @staticmethod
    def names() -> list[str]:
        """Boards that ship with the library."""
        return sorted(path.stem for path in _FOLDER.glob("*.toml"))

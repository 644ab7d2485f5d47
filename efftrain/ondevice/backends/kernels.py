"""Single kernels of the runtime on this machine or on an emulated Cortex-M: what tests and benchmarks call.

Arguments are integers, ``None``, arrays and ``Struct``; arrays are changed in place on either machine, and views of one
array overlap on both as they do here.
"""

import ctypes
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from efftrain.errors import DeviceFault, ToolError
from efftrain.ondevice.backends.toolchain import Kind, Toolchain, board_toolchain, build, host_toolchain
from efftrain.ondevice.emit.project import runtime_sources, template
from efftrain.ondevice.target import Cpu

_CODE, _RAM, _RAM_BYTES, _STACK_BYTES = 0x08000000, 0x20000000, 4 << 20, 4096
_PAGE = 4096
_SCRIPT = f"""
MEMORY {{ FLASH (rx) : ORIGIN = {_CODE:#x}, LENGTH = 1M  RAM (rw) : ORIGIN = {_RAM:#x}, LENGTH = {_RAM_BYTES} }}
ENTRY(Reset_Handler)
SECTIONS
{{
  .vectors : {{ KEEP(*(.vectors)) }} > FLASH
  .text : {{ *(.text .text.*) *(.rodata .rodata.*) }} > FLASH
  .ARM.extab : {{ *(.ARM.extab*) }} > FLASH
  .ARM.exidx : {{ *(.ARM.exidx*) }} > FLASH
  .stack (NOLOAD) : {{ . = . + {_STACK_BYTES}; _stack_top = .; }} > RAM
  .bss (NOLOAD) : {{ _bss_start = .; *(.bss .bss.* .data .data.*) _bss_end = .; }} > RAM
}}
"""


@dataclass(frozen=True, slots=True)
class Struct:
    """A structure of ``eft.h``, passed by reference: int32 members, arrays for pointers, and structures within."""

    members: tuple["Value", ...]

    def __init__(self, *members: "Value") -> None:
        object.__setattr__(self, "members", members)


Value = int | None | np.ndarray | Struct


class KernelMachine(Protocol):
    """Where kernels run."""

    def call(self, kernel: str, *arguments: Value) -> int:
        """Run one kernel; its result as int32, meaningless if it has none."""


class HostKernels:
    """The kernels in this process.

    Args:
        kind: Which compiler.
        extra: More options for it.
    """

    def __init__(self, kind: Kind = "auto", extra: tuple[str, ...] = ()) -> None:
        self._library = ctypes.CDLL(str(build(host_toolchain(kind), runtime_sources(), "libeft.so", extra)))

    def call(self, kernel: str, *arguments: Value) -> int:
        """Run one kernel."""
        keep: list[Any] = []

        def address(value: np.ndarray | Struct | None) -> int:
            if value is None:
                return 0
            if isinstance(value, np.ndarray):
                return int(value.ctypes.data)
            keep.append(ctypes.create_string_buffer(_packed(value, 8, address)))
            return ctypes.addressof(keep[-1])

        values = [
            ctypes.c_uint32(a & 0xFFFFFFFF) if isinstance(a, int) else ctypes.c_void_p(address(a)) for a in arguments
        ]
        function = getattr(self._library, kernel)
        function.restype = ctypes.c_int32
        return int(function(*values))


class BoardKernels:
    """The kernels as code of a Cortex-M in unicorn.

    Args:
        cpu: ``cortex-m0plus`` has no SIMD instructions, ``cortex-m4``, ``cortex-m7`` and ``cortex-m33`` have.
        kind: Which cross compiler.
        optimize: Another ``-O`` than the firmware's.

    Raises:
        ToolError: A tool is missing.
    """

    def __init__(self, cpu: Cpu | str = "cortex-m7", kind: Kind = "auto", optimize: str = "") -> None:
        unicorn, arm, elf_file = _modules()
        self._unicorn, self._arm = unicorn, arm
        toolchain: Toolchain = board_toolchain(cpu, kind)  # type: ignore[arg-type]
        sources = {
            **runtime_sources(),
            "startup.c": template("startup.c"),
            "main.c": "int main(void);int main(void){return 0;}\n",
        }
        extra = ("-Wl,--no-gc-sections", *((optimize,) if optimize else ()))
        self.path: Path = build(toolchain, sources, "kernels.elf", extra, _SCRIPT)
        model = {"cortex-m0plus": "M0", "cortex-m4": "M4", "cortex-m7": "M7", "cortex-m33": "M33"}[cpu]
        self._uc = unicorn.Uc(unicorn.UC_ARCH_ARM, unicorn.UC_MODE_THUMB | unicorn.UC_MODE_MCLASS)
        self._uc.ctl_set_cpu_model(getattr(arm, f"UC_CPU_ARM_CORTEX_{model}"))
        self._uc.mem_map(_CODE, 1 << 20, unicorn.UC_PROT_READ | unicorn.UC_PROT_EXEC)
        self._uc.mem_map(_RAM, _RAM_BYTES, unicorn.UC_PROT_READ | unicorn.UC_PROT_WRITE)
        with self.path.open("rb") as file:
            elf = elf_file(file)
            table: Any = elf.get_section_by_name(".symtab")
            self._symbols: Mapping[str, int] = {s.name: s["st_value"] & ~1 for s in table.iter_symbols() if s.name}
            self.code_bytes = {s.name: s["st_size"] for s in table.iter_symbols() if s.name.startswith("eft_")}
            for segment in elf.iter_segments():
                if segment["p_type"] == "PT_LOAD" and segment["p_filesz"] and segment["p_paddr"] < _RAM:
                    self._uc.mem_write(segment["p_paddr"], segment.data())
        self._lengths: dict[tuple[int, int], int] = {}
        self.instructions = 0
        """Of the last call, if it was counted."""

    def count(self, kernel: str, *arguments: Value) -> int:
        """Instructions of one call, which is really made."""
        self.instructions = 0

        def on_block(uc: Any, address: int, size: int, _: object) -> None:
            if (address, size) not in self._lengths:
                self._lengths[address, size] = num_instructions(bytes(uc.mem_read(address, size)))
            self.instructions += self._lengths[address, size]

        hook = self._uc.hook_add(self._unicorn.UC_HOOK_BLOCK, on_block)
        try:
            self.call(kernel, *arguments)
        finally:
            self._uc.hook_del(hook)
        return self.instructions

    def call(self, kernel: str, *arguments: Value) -> int:
        """Run one kernel. The arrays are copied to the board and back.

        Raises:
            DeviceFault: It left its memory, or the stack it may take.
        """
        uc, arm = self._uc, self._arm
        roots: dict[int, tuple[np.ndarray, int]] = {}
        free = _RAM + _STACK_BYTES

        def place(data: bytes) -> int:
            nonlocal free
            start, free = free, -(-(free + len(data) + 16) // 16) * 16
            uc.mem_write(start, data)
            return start

        def address(value: np.ndarray | Struct | None) -> int:
            if value is None:
                return 0
            if isinstance(value, Struct):
                return place(_packed(value, 4, address))
            root = value
            while isinstance(root.base, np.ndarray):
                root = root.base
            if id(root) not in roots:
                roots[id(root)] = (root, place(root.tobytes()))
            return roots[id(root)][1] + int(value.ctypes.data) - int(root.ctypes.data)

        words = [a & 0xFFFFFFFF if isinstance(a, int) else address(a) for a in arguments]
        back = _CODE + (1 << 20) - 16
        stack = _RAM + _STACK_BYTES - 4 * max(0, len(words) - 4) - 8 & ~7
        uc.mem_write(stack, b"".join(struct.pack("<I", word) for word in words[4:]))
        registers = (arm.UC_ARM_REG_R0, arm.UC_ARM_REG_R1, arm.UC_ARM_REG_R2, arm.UC_ARM_REG_R3)
        for register, word in zip(registers, words, strict=False):
            uc.reg_write(register, word)
        uc.reg_write(arm.UC_ARM_REG_SP, stack)
        uc.reg_write(arm.UC_ARM_REG_LR, back | 1)
        try:
            uc.emu_start(self._symbols[kernel] | 1, back)
        except self._unicorn.UcError as error:
            pc = uc.reg_read(arm.UC_ARM_REG_PC)
            raise DeviceFault(
                f"{kernel} stopped at {pc - self._symbols[kernel]:#x} behind its start: {error}"
            ) from error
        for root, start in roots.values():
            if root.flags.writeable:
                root[...] = np.frombuffer(bytes(uc.mem_read(start, root.nbytes)), root.dtype).reshape(root.shape)
        return int(struct.unpack("<i", struct.pack("<I", uc.reg_read(arm.UC_ARM_REG_R0) & 0xFFFFFFFF))[0])


def _modules() -> tuple[Any, Any, Any]:
    try:
        import unicorn
        import unicorn.arm_const
        from elftools.elf.elffile import ELFFile
    except ImportError as error:
        raise ToolError(f"{error.name} is missing. `pip install 'efftrain[board]'` brings it.") from error
    return unicorn, unicorn.arm_const, ELFFile


def num_instructions(code: bytes) -> int:
    """Thumb instructions are 2 bytes, or 4 if their first 5 bits are 0b11101, 0b11110 or 0b11111."""
    count = at = 0
    while at < len(code):
        at += 4 if code[at + 1] >> 3 in (0b11101, 0b11110, 0b11111) else 2
        count += 1
    return count


def _packed(value: Struct, pointer_bytes: int, address: Callable[[np.ndarray | Struct | None], int]) -> bytes:
    """A structure as bytes: members at multiples of their size, the whole a multiple of the largest."""
    data = b""
    aligned = 4
    for member in value.members:
        if isinstance(member, int):
            part, align = struct.pack("<I", member & 0xFFFFFFFF), 4
        elif isinstance(member, Struct):
            part, align = _packed(member, pointer_bytes, address), pointer_bytes if _has_pointer(member) else 4
        else:
            part, align = address(member).to_bytes(pointer_bytes, "little"), pointer_bytes
        data += bytes(-len(data) % align) + part
        aligned = max(aligned, align)
    return data + bytes(-len(data) % aligned)


def _has_pointer(value: Struct) -> bool:
    return any(not isinstance(m, int) and (not isinstance(m, Struct) or _has_pointer(m)) for m in value.members)

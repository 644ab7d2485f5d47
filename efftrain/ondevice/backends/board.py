"""The generated C as firmware on an emulated board that has the board's memory and no byte more."""

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from efftrain.errors import BudgetError, DeviceFault, ToolError
from efftrain.ondevice.backends.engine import Engine, Samples
from efftrain.ondevice.backends.stack import stack_bound
from efftrain.ondevice.backends.toolchain import Kind, board_toolchain, build
from efftrain.ondevice.emit.c_source import CSource
from efftrain.ondevice.emit.project import firmware_sources, linker_script
from efftrain.ondevice.memory import MemoryPlan
from efftrain.ondevice.target import CPUS, Board, CpuName, family_of

_PAGE = 4096
_UNTOUCHED = 0xDEADBEEF
_CHUNK_BYTES = 4 << 20
_STATE_OFFSET = 8
"""Of the trained state in the context, behind seed and learning-rate shift."""
_ERRORS = {
    -1: "a pointer is NULL or a setting is out of its range",
    -2: "the number of bytes is not the model's",
    -3: "the label is not a class",
    -4: "the trained state holds a value that this model cannot have",
}


@dataclass(frozen=True, slots=True)
class Firmware:
    """A linked program."""

    path: Path
    toolchain: str
    ram_bytes: int
    """Everything linked into RAM but the stack."""
    flash_bytes: int
    stack_bound_bytes: int | None
    """From the compiler's stack usage; ``None`` if the compiler wrote none."""
    symbols: Mapping[str, int]
    segments: tuple[tuple[int, bytes], ...]


def build_firmware(
    name: str, code: CSource, plan: MemoryPlan, board: Board, cpu: CpuName | None = None, kind: Kind = "auto"
) -> Firmware:
    """Compile and link a program for a board.

    Args:
        name: The program's prefix.
        code: The generated files.
        plan: What the firmware is held to.
        board: Memory regions, and the processor if ``cpu`` is not given.
        cpu: A short name such as ``m4``.
        kind: Which cross compiler.

    Raises:
        ToolError: A tool is missing or failed.
        BudgetError: The program does not fit the board's regions, or takes more than its plan says.
    """
    if cpu is not None and cpu not in CPUS:
        raise ValueError(f"cpu {cpu!r} is not known; known are {', '.join(CPUS)}")
    processor = CPUS[cpu] if cpu else board.cpu
    toolchain = board_toolchain(processor, kind)
    path = build(toolchain, firmware_sources(name, code), "firmware.elf", script=linker_script(board, plan))
    firmware = _read_elf(path, toolchain.name, board)
    planned = plan.total_ram_bytes - plan.stack_bytes
    if firmware.ram_bytes != planned:
        raise BudgetError(
            f"the firmware links {firmware.ram_bytes} B of RAM besides its stack; the plan says {planned} B"
        )
    # Code of another family than the one that was planned for is of another size.
    allowed = plan.flash_bytes if family_of(processor) is family_of(board.cpu) else board.flash_bytes
    if firmware.flash_bytes > allowed:
        raise BudgetError(f"the firmware takes {firmware.flash_bytes} B of flash; the plan allows {allowed} B")
    if firmware.stack_bound_bytes is not None and firmware.stack_bound_bytes > plan.stack_bytes:
        raise BudgetError(
            f"calls can take {firmware.stack_bound_bytes} B of stack; {plan.stack_bytes} B are reserved. "
            "Raise stack_bytes of the board."
        )
    return firmware


class BoardEngine(Engine):
    """The firmware in unicorn. An access outside flash, RAM and the sample window raises ``DeviceFault``.

    Args:
        firmware: From ``build_firmware``.
        board: The memory that is mapped.
        cpu: A short name such as ``m4``; the board's own if not given.
        input_shape: Height, width, channels.
        num_classes: Labels are in [0, num_classes).
        state_bytes: Length of the trained state.
        seed: Of the stochastic rounding.
        timeout_s: A call that takes longer on the host's clock is a fault.
    """

    def __init__(
        self,
        firmware: Firmware,
        board: Board,
        cpu: CpuName | None,
        input_shape: tuple[int, int, int],
        num_classes: int,
        state_bytes: int,
        seed: int,
        timeout_s: float = 300.0,
    ) -> None:
        super().__init__(input_shape, num_classes, state_bytes)
        self.firmware, self._board, self._timeout_s = firmware, board, timeout_s
        self.instructions = 0
        """Executed by the last ``count_instructions``."""
        self._fault = ""
        self._core = _core(cpu or board.cpu_name)
        self._uc = self._machine()
        self._invoke("board_init", seed & 0xFFFFFFFF)

    # --- measurements -------------------------------------------------------------------------------------------------

    @property
    def measured_stack_bytes(self) -> int:
        """Deepest stack of any call so far, from the highest word that still holds the pattern of the start."""
        bottom, top = self.firmware.symbols["_stack_bottom"], self.firmware.symbols["_stack_top"]
        words = np.frombuffer(bytes(self._uc.mem_read(bottom, top - bottom)), "<u4")
        touched = np.flatnonzero(words != _UNTOUCHED)
        return 0 if not touched.size else int(4 * (len(words) - touched[0]))

    @property
    def measured_ram_bytes(self) -> int:
        """All linked data and the stack that was really touched."""
        return self.firmware.ram_bytes + self.measured_stack_bytes

    def count_instructions(self, x: Samples, label: int | None = None) -> int:
        """Instructions of one training step, or of a prediction without a label. The step is really made."""
        unicorn = _unicorn()
        lengths: dict[tuple[int, int], int] = {}
        total = 0

        def on_block(uc: Any, address: int, size: int, _: object) -> None:
            nonlocal total
            if (address, size) not in lengths:
                lengths[address, size] = _num_instructions(bytes(uc.mem_read(address, size)), self._core.is_wide)
            total += lengths[address, size]

        # What was translated before the hook was there would run without it.
        self._uc.ctl_flush_tb()
        hook = self._uc.hook_add(unicorn.UC_HOOK_BLOCK, on_block)
        try:
            self.predict(x) if label is None else self.train_step(x, label)
        finally:
            self._uc.hook_del(hook)
        self.instructions = total
        return total

    # --- engine -------------------------------------------------------------------------------------------------------

    def state(self) -> bytes:
        """The trained state, read from the board's RAM."""
        return bytes(self._uc.mem_read(self.firmware.symbols["board_context"] + _STATE_OFFSET, self.state_bytes))

    def _load_state(self, state: bytes) -> None:
        self._write_window(state)
        self._invoke("board_load_state", self._board.data_origin, len(state))

    def _set_lr_shift(self, halvings: int) -> None:
        self._invoke("board_set_lr_shift", halvings)

    def _predict(self, x: Samples) -> int:
        self._write_window(x.tobytes())
        return self._invoke("board_predict", self._board.data_origin)

    def _train_step(self, x: Samples, label: int) -> int:
        self._write_window(x.tobytes())
        return self._invoke("board_train_step", self._board.data_origin, label)

    def _train(self, xs: Samples, labels: npt.NDArray[np.int32]) -> int:
        return self._many("board_train", xs, labels)

    def _count_right(self, xs: Samples, labels: npt.NDArray[np.int32]) -> int:
        return self._many("board_evaluate", xs, labels)

    def _many(self, entry: str, xs: Samples, labels: npt.NDArray[np.int32]) -> int:
        """Through the sample window, a chunk at a time: all the loops run on the board."""
        size = int(np.prod(self.input_shape))
        chunk = max(1, _CHUNK_BYTES // (size + 4))
        right = 0
        for start in range(0, len(labels), chunk):
            part = labels[start : start + chunk].astype("<i4")
            samples = xs[start : start + chunk].tobytes()
            padding = -len(samples) % 4
            self._write_window(samples + bytes(padding) + part.tobytes())
            labels_at = self._board.data_origin + len(samples) + padding
            right += self._invoke(entry, self._board.data_origin, labels_at, len(part))
        return right

    # --- machine ------------------------------------------------------------------------------------------------------

    def _machine(self) -> Any:
        unicorn, core = _unicorn(), self._core
        uc = unicorn.Uc(core.architecture, core.mode)
        if core.model is not None:
            uc.ctl_set_cpu_model(core.model)
        board, symbols = self._board, self.firmware.symbols
        uc.mem_map(board.flash_origin, _pages(board.flash_bytes), unicorn.UC_PROT_READ | unicorn.UC_PROT_EXEC)
        uc.mem_map(board.ram_origin, _pages(board.ram_bytes), unicorn.UC_PROT_READ | unicorn.UC_PROT_WRITE)
        uc.mem_map(board.data_origin, _pages(_CHUNK_BYTES), unicorn.UC_PROT_READ)
        for address, data in self.firmware.segments:
            uc.mem_write(address, data)
        bottom, top = symbols["_stack_bottom"], symbols["_stack_top"]
        uc.mem_write(bottom, struct.pack("<I", _UNTOUCHED) * ((top - bottom) // 4))

        def on_fault(_: Any, access: int, address: int, size: int, value: int, data: object) -> bool:
            self._fault = f"{size} bytes at {address:#010x}"
            return False

        uc.hook_add(unicorn.UC_HOOK_MEM_INVALID, on_fault)
        end = board.ram_origin + board.ram_bytes
        if end % _PAGE:
            # Memory is mapped in whole pages; what is beyond the board's last byte must fault like any other hole.
            def on_slack(engine: Any, access: int, address: int, size: int, value: int, data: object) -> None:
                if address + size > end:
                    self._fault = f"{size} bytes at {address:#010x}"
                    engine.emu_stop()

            access = unicorn.UC_HOOK_MEM_READ | unicorn.UC_HOOK_MEM_WRITE
            uc.hook_add(access, on_slack, begin=end - 7, end=board.ram_origin + _pages(board.ram_bytes) - 1)
        return uc

    def _write_window(self, data: bytes) -> None:
        if len(data) > _pages(_CHUNK_BYTES):
            raise ValueError(f"{len(data)} bytes do not fit the board's sample window of {_CHUNK_BYTES}")
        self._uc.mem_write(self._board.data_origin, data)

    def _invoke(self, entry: str, *arguments: int) -> int:
        """Call a function of the driver and wait for it to return."""
        unicorn, core = _unicorn(), self._core
        uc, symbols = self._uc, self.firmware.symbols
        back = self._board.flash_origin + self._board.flash_bytes - 16
        uc.reg_write(core.stack, symbols["_stack_top"])
        uc.reg_write(core.link, back | core.code_bit)
        for register, value in zip(core.arguments, arguments, strict=False):
            uc.reg_write(register, value)
        self._fault = ""
        try:
            uc.emu_start(symbols[entry] | core.code_bit, back, timeout=int(self._timeout_s * 1e6))
        except unicorn.UcError as error:
            raise self._device_fault(entry, str(error)) from error
        if self._fault:
            raise self._device_fault(entry, "access outside RAM")
        if uc.reg_read(core.counter) & ~1 != back:
            raise DeviceFault(f"{entry} did not finish within {self._timeout_s:.0f} s on {self._board.name}")
        result = struct.unpack("<i", struct.pack("<I", uc.reg_read(core.arguments[0]) & 0xFFFFFFFF))[0]
        if result < 0 and entry != "board_init":
            raise ValueError(f"{self._board.name}: {_ERRORS.get(result, f'error {result}')}")
        return int(result)

    def _device_fault(self, entry: str, reason: str) -> DeviceFault:
        board = self._board
        pc = self._uc.reg_read(self._core.counter)
        where = f" ({self._fault})" if self._fault else ""
        return DeviceFault(
            f"{entry} on {board.name} stopped at pc {pc:#010x}: {reason}{where}. RAM is [{board.ram_origin:#010x}, "
            f"{board.ram_origin + board.ram_bytes:#010x}); below it lies the end of the stack."
        )


def _read_elf(path: Path, toolchain: str, board: Board) -> Firmware:
    try:
        from elftools.elf.elffile import ELFFile
    except ImportError as error:
        raise ToolError("pyelftools is missing. `pip install 'efftrain[board]'` brings it.") from error
    with path.open("rb") as file:
        elf = ELFFile(file)
        table: Any = elf.get_section_by_name(".symtab")
        symbols = {s.name: s["st_value"] & ~1 for s in table.iter_symbols() if s.name}
        ram = flash = 0
        for section in elf.iter_sections():
            if section["sh_flags"] & 2:  # takes memory
                if board.ram_origin <= section["sh_addr"] < board.ram_origin + board.ram_bytes:
                    ram += section["sh_size"] if section.name != ".stack" else 0
                elif section["sh_type"] == "SHT_PROGBITS" or section["sh_type"] == "SHT_ARM_EXIDX":
                    flash += section["sh_size"]
        segments = tuple(
            (s["p_paddr"], s.data())
            for s in elf.iter_segments()
            if s["p_type"] == "PT_LOAD"
            and s["p_filesz"]
            and board.flash_origin <= s["p_paddr"] < board.flash_origin + board.flash_bytes
        )
    bound = stack_bound(path)
    return Firmware(path, toolchain, ram, flash, bound, symbols, segments)


@dataclass(frozen=True, slots=True)
class _Core:
    """A processor as unicorn has it: which machine, and the registers of a call."""

    architecture: int
    mode: int
    model: int | None
    counter: int
    stack: int
    link: int
    arguments: tuple[int, ...]
    """The first one holds the result."""
    code_bit: int
    """Set in the address of code."""
    is_wide: Callable[[int, int], bool]
    """Whether an instruction that begins with these two bytes has four."""


def _core(cpu: CpuName) -> _Core:
    unicorn = _unicorn()
    if cpu == "rv32":
        import unicorn.riscv_const as riscv

        return _Core(
            unicorn.UC_ARCH_RISCV,
            unicorn.UC_MODE_RISCV32,
            None,
            riscv.UC_RISCV_REG_PC,
            riscv.UC_RISCV_REG_SP,
            riscv.UC_RISCV_REG_RA,
            (riscv.UC_RISCV_REG_A0, riscv.UC_RISCV_REG_A1, riscv.UC_RISCV_REG_A2, riscv.UC_RISCV_REG_A3),
            0,
            lambda low, _: low & 3 == 3,
        )
    import unicorn.arm_const as arm

    models = {
        "m0plus": arm.UC_CPU_ARM_CORTEX_M0,
        "m4": arm.UC_CPU_ARM_CORTEX_M4,
        "m7": arm.UC_CPU_ARM_CORTEX_M7,
        "m33": arm.UC_CPU_ARM_CORTEX_M33,
    }
    if cpu not in models:
        raise ToolError(f"unicorn does not emulate {CPUS[cpu]}; it does {', '.join(models)} and rv32")
    return _Core(
        unicorn.UC_ARCH_ARM,
        unicorn.UC_MODE_THUMB | unicorn.UC_MODE_MCLASS,
        models[cpu],
        arm.UC_ARM_REG_PC,
        arm.UC_ARM_REG_SP,
        arm.UC_ARM_REG_LR,
        (arm.UC_ARM_REG_R0, arm.UC_ARM_REG_R1, arm.UC_ARM_REG_R2, arm.UC_ARM_REG_R3),
        1,
        lambda _, high: high >> 3 in (0b11101, 0b11110, 0b11111),
    )


def _unicorn() -> Any:
    try:
        import unicorn
    except ImportError as error:
        raise ToolError("the emulator unicorn is missing. `pip install 'efftrain[board]'` brings it.") from error
    return unicorn


def _num_instructions(code: bytes, is_wide: Callable[[int, int], bool]) -> int:
    """Thumb's and RISC-V's are 2 bytes, or 4."""
    count = at = 0
    while at < len(code):
        at += 4 if is_wide(code[at], code[at + 1]) else 2
        count += 1
    return count


def _pages(num_bytes: int) -> int:
    return -(-num_bytes // _PAGE) * _PAGE

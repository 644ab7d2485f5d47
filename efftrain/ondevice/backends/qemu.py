"""The firmware in qemu-system-arm: a second emulator that counts every instruction and enforces memory with the MPU.

The machines are Arm's MPS2 boards, ``mps2-an500`` (Cortex-M7) and ``mps2-an386`` (Cortex-M4), whose memories lie
elsewhere than a product's: the firmware is the same, linked for ``relocated(board)``. It runs unprivileged beside a
small supervisor in memory of its own (``qemu_supervisor.c``). Each call is a process of its own that begins with the
state the last one left, so an engine holds nothing but bytes.
"""

import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from efftrain.errors import DeviceFault, ToolError
from efftrain.ondevice.backends.board import Firmware
from efftrain.ondevice.backends.engine import Engine, Samples
from efftrain.ondevice.backends.toolchain import Kind, board_toolchain, build
from efftrain.ondevice.target import CPUS, Board, CpuName

if TYPE_CHECKING:
    from efftrain.ondevice.program import Program

INSTRUCTIONS_PER_TICK = 40
"""The timer runs at 25 MHz; under ``-icount shift=0`` an instruction takes 1 ns. A call itself adds a tick or two."""
RAM_GRANULE = 32
"""The smallest part of a region of the MPU: a board's RAM ends within so many bytes of where it should."""

_FLASH, _RAM, _SAMPLES, _OWN = 0x0010_0000, 0x2000_0000, 0x2020_0000, 0x2030_0000
_MOST_FLASH, _MOST_RAM, _WINDOW, _MOST_STATE = 0x0020_0000, 0x0010_0000, 1 << 20, 1 << 20
_BACK = 0x000F_0000
_STATE_OFFSET = 8
"""Of the trained state in the context, behind seed and learning-rate shift."""
_MACHINES: dict[CpuName, str] = {"m7": "mps2-an500", "m4": "mps2-an386"}
_READ_WRITE, _READ_ONLY = 3 << 24 | 1 << 28, 6 << 24
_SCRIPT = f"""
MEMORY {{ CODE (rx) : ORIGIN = 0, LENGTH = 0xF0000  OWN (rw) : ORIGIN = {_OWN:#x}, LENGTH = 0x10000 }}
ENTRY(reset_handler)
SECTIONS
{{
  .vectors : {{ KEEP(*(.vectors)) }} > CODE
  .text : {{ *(.text .text.*) *(.rodata .rodata.*) }} > CODE
  .ARM.extab : {{ *(.ARM.extab*) }} > CODE
  .ARM.exidx : {{ *(.ARM.exidx*) }} > CODE
  .bss (NOLOAD) : {{ *(.bss .bss.* .data .data.*) . = ALIGN(8); . = . + 4096; supervisor_stack_top = .; }} > OWN
}}
"""
_ERRORS = {
    -1: "a pointer is NULL or a setting is out of its range",
    -2: "the number of bytes is not the model's",
    -3: "the label is not a class",
    -4: "the trained state holds a value that this model cannot have",
}


@dataclass(frozen=True, slots=True)
class _Outcome:
    status: int
    pc: int
    address: int
    cause: int
    result: int
    num_done: int
    touched_stack: int
    state: bytes
    results: list[int]
    instructions: list[int]


def relocated(board: Board) -> Board:
    """The same board with its memories where QEMU's machine has some.

    Raises:
        ValueError: It has more than the machine.
    """
    if board.ram_bytes > _MOST_RAM or board.flash_bytes > _MOST_FLASH:
        raise ValueError(
            f"{board.name} has {board.ram_bytes} B of RAM and {board.flash_bytes} B of flash; the emulated machine has "
            f"room for {_MOST_RAM} and {_MOST_FLASH}. Use the unicorn target."
        )
    return replace(board, flash_origin=_FLASH, ram_origin=_RAM, data_origin=_SAMPLES)


class QemuEngine(Engine):
    """Firmware in qemu-system-arm. An access outside flash, RAM and the sample window raises ``DeviceFault``.

    Args:
        firmware: From ``build_firmware`` for ``relocated(board)``.
        board: The memory that exists.
        cpu: ``m4`` or ``m7``; the board's own if not given.
        input_shape: Height, width, channels.
        num_classes: Labels are in [0, num_classes).
        state_bytes: Length of the trained state.
        seed: Of the stochastic rounding.
        timeout_s: A call that takes longer on the host's clock is a fault.

    Raises:
        ToolError: qemu-system-arm or the compiler is missing.
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
        self.firmware, self._board, self._timeout_s = firmware, relocated(board), timeout_s
        self._cpu = cpu or board.cpu_name
        if self._cpu not in _MACHINES:
            raise ToolError(f"no QEMU machine is set up for {CPUS[self._cpu]}; there are {', '.join(_MACHINES)}")
        self._seed = seed & 0xFFFFFFFF
        self._qemu, self._supervisor = _qemu(), _supervisor(self._cpu)
        if state_bytes > _MOST_STATE or int(np.prod(input_shape)) > _WINDOW:
            raise ValueError(f"a sample and the trained state must fit the sample window of {_WINDOW} B")
        self.instructions: list[int] = []
        """Of each step or prediction of the last call, to the next 40."""
        self.measured_stack_bytes = 0
        """Deepest stack of any call so far, one exception frame at least."""
        self._state = self._run(None, [], [])[1]

    @classmethod
    def of(
        cls,
        program: "Program",
        cpu: CpuName | None = None,
        *,
        seed: int | None = None,
        toolchain: Kind = "auto",
        board: Board | None = None,
        timeout_s: float = 300.0,
    ) -> "QemuEngine":
        """A program on its board, or on another; the arguments are those of ``Program.board``."""
        target = board or program.target
        return cls(
            program.firmware(cpu, toolchain, relocated(target)),
            target,
            cpu,
            program.input_shape,
            program.num_classes,
            program.layout.num_bytes,
            program.seed if seed is None else seed,
            timeout_s,
        )

    # --- measurements -------------------------------------------------------------------------------------------------

    @property
    def measured_ram_bytes(self) -> int:
        """All linked data and the stack that was really touched."""
        return self.firmware.ram_bytes + self.measured_stack_bytes

    def count_instructions(self, x: Samples, label: int | None = None) -> int:
        """Instructions of one training step, or of a prediction without a label. The step is really made."""
        if label is None:
            self.predict(x)
        else:
            self.train_step(x, label)
        return self.instructions[0]

    # --- engine -------------------------------------------------------------------------------------------------------

    def state(self) -> bytes:
        """The trained state."""
        return self._state

    def _load_state(self, state: bytes) -> None:
        self._state = self._run(state, [], [])[1]

    def _set_lr_shift(self, halvings: int) -> None:
        self._lr_shift = halvings

    def _predict(self, x: Samples) -> int:
        return self._run(self._state, [x], [-1])[0][0]

    def _train_step(self, x: Samples, label: int) -> int:
        results, self._state = self._run(self._state, [x], [label])
        return results[0]

    def _train(self, xs: Samples, labels: npt.NDArray[np.int32]) -> int:
        results, self._state = self._run(self._state, xs, labels.tolist())
        return int((np.array(results) == labels).sum())

    def _count_right(self, xs: Samples, labels: npt.NDArray[np.int32]) -> int:
        results, _ = self._run(self._state, xs, [-1] * len(labels))
        return int((np.array(results) == labels).sum())

    # --- machine ------------------------------------------------------------------------------------------------------

    def _run(self, state: bytes | None, xs: Sequence[Samples] | Samples, labels: list[int]) -> tuple[list[int], bytes]:
        """One process: from a state, or from the initial one, through some samples; label -1 only predicts."""
        symbols, board = self.firmware.symbols, self._board
        regions = [*_regions(board.flash_origin, board.flash_bytes, _READ_ONLY, exact=False)]
        regions += _regions(board.data_origin, _WINDOW, _READ_ONLY | 1 << 28, exact=False)
        regions += _regions(board.ram_origin, board.ram_bytes, _READ_WRITE, exact=True)
        entries = ("board_init", "board_load_state", "board_set_lr_shift", "board_train_step", "board_predict")
        sample_bytes = int(np.prod(self.input_shape))
        header = struct.pack(
            "<10I",
            *(symbols[entry] for entry in entries),
            symbols["board_context"] + _STATE_OFFSET,
            self.state_bytes,
            symbols["_stack_bottom"],
            symbols["_stack_top"],
            len(regions),
        )
        words = [word for region in regions for word in region]
        header += struct.pack("<16I", *words, *[0] * (16 - len(words)))
        header += struct.pack("<5I", self._seed, self._lr_shift, state is not None, len(labels), sample_bytes)
        body = b"".join(struct.pack("<i", label) + x.tobytes() for x, label in zip(xs, labels, strict=True))
        outcome = self._process(header + (state or b"") + body, len(labels))
        self._check(outcome, len(labels))
        self.instructions = outcome.instructions
        self.measured_stack_bytes = max(self.measured_stack_bytes, outcome.touched_stack)
        return outcome.results, outcome.state

    def _process(self, job: bytes, num_samples: int) -> _Outcome:
        with tempfile.TemporaryDirectory(prefix="efftrain-qemu-") as name:
            folder = Path(name)
            (folder / "job.bin").write_bytes(job)
            command = [
                *(self._qemu, "-machine", _MACHINES[self._cpu], "-nographic", "-monitor", "none", "-serial", "none"),
                *("-semihosting-config", "enable=on,target=native", "-icount", "shift=0,sleep=off"),
                *("-kernel", str(self._supervisor), "-device", f"loader,file={self.firmware.path}"),
            ]
            try:
                done = subprocess.run(
                    command,
                    cwd=folder,
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    timeout=self._timeout_s,
                    check=False,
                )
            except subprocess.TimeoutExpired as error:
                raise DeviceFault(
                    f"{num_samples} samples did not finish within {self._timeout_s:.0f} s on {self._board.name}"
                ) from error
            end = folder / "end.bin"
            data = end.read_bytes() if end.exists() else b""
            if done.returncode or len(data) != 28 + self.state_bytes:
                text = done.stderr.decode(errors="replace").strip().splitlines()
                raise ToolError(
                    f"qemu-system-arm ended with status {done.returncode}: {text[-1] if text else 'silent'}"
                )
            pairs = np.frombuffer((folder / "records.bin").read_bytes(), "<i4").reshape(-1, 2)
        status, pc, address, cause, result, num_done, touched = struct.unpack("<IIIIiII", data[:28])
        ticks = [int(tick) * INSTRUCTIONS_PER_TICK for tick in pairs[:, 1].astype(np.uint32)]
        results = [int(value) for value in pairs[:, 0]]
        return _Outcome(status, pc, address, cause, result, num_done, touched, data[28:], results, ticks)

    def _check(self, outcome: _Outcome, num_samples: int) -> None:
        board = self._board
        ram = f"RAM is [{board.ram_origin:#010x}, {board.ram_origin + board.ram_bytes:#010x})"
        if outcome.status == 2:
            raise DeviceFault(f"{board.name}: the stack left its memory, at call {outcome.num_done} of samples. {ram}")
        if outcome.status:
            where = f", access to {outcome.address:#010x}" if outcome.address else ""
            raise DeviceFault(
                f"{self._function(outcome.pc)} on {board.name} stopped at pc {outcome.pc:#010x}{where} (fault status "
                f"{outcome.cause:#x}) in sample {outcome.num_done} of {num_samples}. {ram}; below it ends the stack."
            )
        if outcome.result < 0:
            raise ValueError(f"{board.name}: {_ERRORS.get(outcome.result, f'error {outcome.result}')}")

    def _function(self, pc: int) -> str:
        before = [(at, name) for name, at in self.firmware.symbols.items() if at <= pc and not name.startswith("$")]
        return max(before)[1] if before else "the firmware"


def _regions(start: int, num_bytes: int, attributes: int, *, exact: bool) -> list[tuple[int, int]]:
    """Regions of the MPU for ``[start, start + num_bytes)``: powers of two, of whose eighths some may be left out.

    Args:
        start: A multiple of what is covered by one region.
        num_bytes: Rounded up to 32 if exact, else to a region.
        attributes: Of the attribute register, without size and enable.
        exact: Whether what is beyond must fault.
    """
    regions = []
    left = -(-num_bytes // RAM_GRANULE) * RAM_GRANULE
    while left > 0:
        # What is left begins at a multiple of what it is rounded up to; only the smallest region has more, 256 bytes.
        size = max(256, 1 << (left - 1).bit_length())
        base = start // size * size
        eighth = size // 8
        first = (start - base) // eighth
        end = first + left // eighth if exact else 8
        disabled = 0xFF & ~((1 << end) - (1 << first))
        regions.append((base, attributes | disabled << 8 | (size.bit_length() - 2) << 1 | 1))
        start, left = base + end * eighth, left - (end - first) * eighth
    return regions


def _qemu() -> str:
    found = shutil.which("qemu-system-arm")
    if found is None:
        raise ToolError(
            "qemu-system-arm is missing. `apt install qemu-system-arm` brings it; the unicorn targets run the same "
            "firmware without it."
        )
    return found


def _supervisor(cpu: CpuName) -> Path:
    text = (Path(__file__).parent / "qemu_supervisor.c").read_text()
    source = Template(text).substitute(data_origin=f"{_SAMPLES:#x}U", back_address=f"{_BACK:#x}U")
    toolchain = board_toolchain(CPUS[cpu])
    return build(toolchain, {"supervisor.c": source}, "supervisor.elf", script=_SCRIPT)

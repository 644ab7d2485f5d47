"""An estimate of energy from operation counts. Good for comparing two models, not for sizing a battery.

The table is of one chip technology, 45 nm at 0.9 V, and counts arithmetic and data movement only: no instruction fetch,
no clock, no leakage, no radio. A processor of another node differs by several times; the ratios change far less: a
32-bit multiplication costs some 18 times an 8-bit one, and fetching a number from DRAM some hundred times using it.

Source: M. Horowitz, "Computing's energy problem (and what we can do about it)", ISSCC 2014, figure 1.1.9.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from efftrain.errors import ConfigError

NumberFormat = Literal["fp32", "fp16", "int8"]
MemoryLevel = Literal["sram-8k", "sram-32k", "sram-1m", "dram"]


@dataclass(frozen=True)
class Arithmetic:
    """Energy of one addition and one multiplication, and the width of a number."""

    add_pj: float
    multiply_pj: float
    num_bytes: int

    @property
    def mac_pj(self) -> float:
        """One multiplication and one addition."""
        return self.add_pj + self.multiply_pj


OPERATION_PJ: Mapping[str, float] = {
    "int8 add": 0.03,
    "int32 add": 0.1,
    "fp16 add": 0.4,
    "fp32 add": 0.9,
    "int8 multiply": 0.2,
    "int32 multiply": 3.1,
    "fp16 multiply": 1.1,
    "fp32 multiply": 3.7,
}
"""The source's figures for one operation, in pJ."""

ARITHMETIC: Mapping[NumberFormat, Arithmetic] = {
    "fp32": Arithmetic(OPERATION_PJ["fp32 add"], OPERATION_PJ["fp32 multiply"], 4),
    # bfloat16 is counted as fp16: the source has no figure for it, and a narrower significand costs no more.
    "fp16": Arithmetic(OPERATION_PJ["fp16 add"], OPERATION_PJ["fp16 multiply"], 2),
    # Products of 8-bit numbers are summed in 32 bits.
    "int8": Arithmetic(OPERATION_PJ["int32 add"], OPERATION_PJ["int8 multiply"], 1),
}
"""Multiply-accumulate per number format."""

# Largest working set in bytes, energy of one 64-bit access in pJ. DRAM: the middle of the source's 1.3 to 2.6 nJ.
_LEVELS: Mapping[MemoryLevel, tuple[float, float]] = {
    "sram-8k": (8 << 10, 10.0),
    "sram-32k": (32 << 10, 20.0),
    "sram-1m": (1 << 20, 100.0),
    "dram": (float("inf"), 1950.0),
}

BYTE_PJ: Mapping[MemoryLevel, float] = {level: access_pj / 8 for level, (_, access_pj) in _LEVELS.items()}
"""Energy of moving one byte from or to each level of memory, in pJ. Reuse inside registers is counted as free, for the
source's table has no figure for them."""


def memory_level(working_set_bytes: int) -> MemoryLevel:
    """The smallest memory that holds so many bytes."""
    for level, (capacity, _) in _LEVELS.items():
        if working_set_bytes <= capacity:
            return level
    raise AssertionError("DRAM holds everything")


def estimate_pj(macs: int, moved_bytes: int, number_format: NumberFormat, level: MemoryLevel) -> float:
    """Energy of some multiply-accumulates and of the bytes they read and write.

    Args:
        macs: Multiply-accumulates.
        moved_bytes: Bytes read and written, each once.
        number_format: What is multiplied.
        level: Where the bytes are.

    Returns:
        pJ. An estimate; see the top of this file.

    Raises:
        ConfigError: An unknown format or level.
    """
    check_number_format(number_format)
    if level not in BYTE_PJ:
        raise ConfigError(f"Unknown memory level {level!r}. Expected one of: {', '.join(BYTE_PJ)}.")
    return macs * ARITHMETIC[number_format].mac_pj + moved_bytes * BYTE_PJ[level]


def check_number_format(number_format: str) -> None:
    """Refuse a format that the table does not have.

    Raises:
        ConfigError: It is not one of ``NumberFormat``.
    """
    if number_format not in ARITHMETIC:
        raise ConfigError(
            f"Unknown number format {number_format!r}. Expected one of: {', '.join(get_args(NumberFormat))}."
        )

"""Device profiles: what a client can hold, how fast it is, what its work costs. One TOML file each, in this folder.

A profile is an order of magnitude, not a measurement of your device: the comments in the files say where each figure is
from and which are estimates. Copy one, put your own figures in, and compare.
"""

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from efftrain.config.load import load_recipe
from efftrain.errors import ConfigError
from efftrain.federated.recipe import DEVICES
from efftrain.ondevice.target import Board

_DAY_S = 86_400.0
_FOLDER = Path(__file__).parent


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceProfile:
    """One kind of device."""

    ram_bytes: int
    """What training may use."""
    flash_bytes: int
    macs_per_s_int8: float
    macs_per_s_fp32: float
    uplink_kbit_s: float
    downlink_kbit_s: float
    loss: float = 0.0
    """Share of the bytes that have to be sent again, in ``[0, 1)``."""
    j_per_mac_int8: float
    j_per_mac_fp32: float
    j_per_uplink_byte: float
    j_per_downlink_byte: float
    battery_j: float
    """0: mains."""
    online_by_day: float
    """Share of such devices that can be asked in the early afternoon."""
    online_by_night: float
    """The same twelve hours later; in between it follows a cosine."""
    slot_s: float
    """A device stays on or off for so long at a time."""

    def __post_init__(self) -> None:
        positive = ("ram_bytes", "flash_bytes", "macs_per_s_int8", "macs_per_s_fp32", "uplink_kbit_s")
        for name in (*positive, "downlink_kbit_s", "slot_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a positive number")
        for name in ("j_per_mac_int8", "j_per_mac_fp32", "j_per_uplink_byte", "j_per_downlink_byte", "battery_j"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 or more")
        for name in ("online_by_day", "online_by_night"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a share in [0, 1]")
        if not 0 <= self.loss < 1:
            raise ValueError(f"loss is {self.loss}, expected a share in [0, 1)")

    @staticmethod
    def named(name: str) -> "DeviceProfile":
        """A profile that ships with the library: one of ``DEVICES``.

        Raises:
            ConfigError: There is no such profile.
        """
        if name not in DEVICES:
            raise ConfigError(f"device profile {name!r} is unknown, expected one of {', '.join(DEVICES)}")
        return _shipped(name)

    @staticmethod
    def load(path: Path | str) -> "DeviceProfile":
        """Read a profile from a TOML file; unknown keys are errors.

        Raises:
            ConfigError: The file is missing, no TOML, or has an unknown key or a value out of range.
        """
        return load_recipe(DeviceProfile, path, what="device profile")

    def board(self, name: str) -> Board:
        """Its memory, for the compiler to plan for. No plan depends on processor or clock, so these are any."""
        return Board(name=name, cpu="cortex-m7", clock_hz=1, ram_bytes=self.ram_bytes, flash_bytes=self.flash_bytes)

    def compute_s(self, macs: float, number_format: str) -> float:
        """Seconds for so many multiply-accumulates in ``"fp32"`` or ``"int8"``."""
        return macs / (self.macs_per_s_int8 if number_format == "int8" else self.macs_per_s_fp32)

    def compute_j(self, macs: float, number_format: str) -> float:
        """Joules for so many multiply-accumulates."""
        return macs * (self.j_per_mac_int8 if number_format == "int8" else self.j_per_mac_fp32)

    def upload_s(self, num_bytes: float) -> float:
        """Seconds to send so many bytes, repeats included."""
        return num_bytes / (1 - self.loss) * 8e-3 / self.uplink_kbit_s

    def download_s(self, num_bytes: float) -> float:
        """Seconds to receive so many bytes, repeats included."""
        return num_bytes / (1 - self.loss) * 8e-3 / self.downlink_kbit_s

    def radio_j(self, uplink_bytes: float, downlink_bytes: float) -> float:
        """Joules to send and to receive so many bytes, repeats included."""
        sent = uplink_bytes * self.j_per_uplink_byte + downlink_bytes * self.j_per_downlink_byte
        return sent / (1 - self.loss)

    def online_share(self, time_s: float) -> float:
        """Share of such devices that can be asked at a time; second 0 is the early afternoon."""
        by_day = 0.5 + 0.5 * math.cos(2 * math.pi * time_s / _DAY_S)
        return self.online_by_night + (self.online_by_day - self.online_by_night) * by_day


@cache
def _shipped(name: str) -> DeviceProfile:
    return DeviceProfile.load(_FOLDER / f"{name}.toml")

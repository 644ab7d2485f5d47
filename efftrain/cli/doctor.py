"""``efftrain doctor``: what is installed, what each missing piece would enable, and the line that installs it."""

import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

from efftrain.cli.console import JsonOption, print_json, print_table


@dataclass(frozen=True)
class Check:
    """One piece. ``probe`` returns its version or place, or ``None`` if it is missing."""

    name: str
    enables: str
    install: str
    probe: Callable[[], str | None]


def doctor_command(as_json: JsonOption = False) -> None:
    """Show what is installed, what each missing piece enables, and the line that installs it."""
    rows = [(check, check.probe()) for check in _checks()]
    if as_json:
        pieces = [{"name": c.name, "found": found, "enables": c.enables, "install": c.install} for c, found in rows]
        print_json({"pieces": pieces, "missing": [c.name for c, found in rows if found is None]})
        return
    from rich.table import Table

    table = Table("piece", "found", "enables", "install with", box=None, pad_edge=False)
    for check, found in rows:
        state = f"[green]{found}[/green]" if found is not None else "[yellow]missing[/yellow]"
        table.add_row(check.name, state, check.enables, "" if found is not None else check.install.replace("[", "\\["))
    print_table(table)


def _checks() -> list[Check]:
    return [
        Check("torch", "everything that trains on the host", "pip install torch", lambda: _version("torch")),
        Check("GPU", "training on CUDA with NCCL; without it CPU and gloo", "a CUDA build of torch", _gpu),
        Check("flwr", "federated rounds", "pip install 'efftrain[federated]'", lambda: _version("flwr")),
        Check("host C compiler", "fast host build of device programs", "pip install 'efftrain[board]'", _host_compiler),
        Check("codec kernels", "codecs many times faster than NumPy", "pip install ziglang", _codec_kernels),
        Check("Cortex-M compiler", "firmware for boards", "pip install 'efftrain[board]'", _cross_compiler),
        Check(
            "unicorn",
            "running firmware in an emulated board",
            "pip install 'efftrain[board]'",
            lambda: _version("unicorn"),
        ),
        Check("pyelftools", "reading firmware files", "pip install 'efftrain[board]'", lambda: _version("pyelftools")),
        Check(
            "qemu-system-arm",
            "a second emulator, with instruction counts",
            "apt install qemu-system-arm",
            lambda: shutil.which("qemu-system-arm"),
        ),
        Check("matplotlib", "plots in report.html", "pip install 'efftrain[report]'", lambda: _version("matplotlib")),
        Check(
            "tensorboard", "tensorboard files", "pip install 'efftrain[tensorboard]'", lambda: _version("tensorboard")
        ),
        Check("torchao", "step.precision=float8", "pip install 'efftrain[float8]'", lambda: _version("torchao")),
        Check("horovod", "gradients over Horovod, started by horovodrun", "bash launch/horovod.sh", _horovod),
        Check("fashion-mnist", "the data set of that name", "apt install dataset-fashion-mnist", _fashion_mnist),
    ]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _horovod() -> str | None:
    """Ours is built for one torch and says so: 0.28.1+torch2.13.0.cpu."""
    found = _version("horovod")
    made_for = (found or "").partition("+torch")[2]
    if made_for and made_for != (_version("torch") or "").replace("+", "."):
        return None
    return found


def _gpu() -> str | None:
    if _version("torch") is None:
        return None
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def _zig() -> str | None:
    return f"zig {_version('ziglang')}" if importlib.util.find_spec("ziglang") else None


def _host_compiler() -> str | None:
    return shutil.which("cc") or shutil.which("gcc") or _zig()


def _codec_kernels() -> str | None:
    from efftrain.compression import kernels

    return kernels.available()


def _cross_compiler() -> str | None:
    return shutil.which("arm-none-eabi-gcc") or _zig()


def _fashion_mnist() -> str | None:
    from efftrain.data import load_dataset
    from efftrain.errors import EfftrainError

    try:
        load_dataset("fashion-mnist", "test")
    except EfftrainError:
        return None
    return "files are complete"

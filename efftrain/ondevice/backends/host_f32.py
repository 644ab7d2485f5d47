"""Clients in fp32 on this machine's processor: a whole local training in one call of generated C.

The C is built for one model and batch size at first use and kept in the cache beside the other builds. A call holds no
lock of Python's, so threads train side by side; each has an arena of its own. Sums are taken in one fixed order:
results are equal to the bit for any number of threads, on processors of one kind.
"""

import ctypes
import hashlib
import math
import platform
import threading
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from efftrain.errors import CompileError, ToolError
from efftrain.ondevice.backends.toolchain import build, host_toolchain
from efftrain.ondevice.emit.f32_plan import HostPlan, check_parameters, plan_host
from efftrain.ondevice.emit.f32_source import host_f32_sources
from efftrain.ondevice.frontend import read_module

Tensors = Mapping[str, npt.NDArray[np.generic]]
Floats = npt.NDArray[np.float32]

_FLAGS = (
    "-march=native",
    "-ffp-contract=fast",  # these kernels have no twin whose bits they must give
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-psabi",  # vectors are passed between inlined functions only
    "-lm",
)


class HostProgram:
    """The training of one model in batches of one size. Safe to call from several threads.

    Args:
        model: A chain of convolutions, linear layers, ReLU and pools whose outputs are logits; its weights are not
            used.
        input_shape: Of a sample, ``(F,)``, ``(C, L)`` or ``(C, H, W)``.
        batch_size: Samples of a step, at least 1.

    Raises:
        CompileError: The model holds something else; the message names the operator.
        ToolError: There is no C compiler.
    """

    def __init__(self, model: nn.Module, input_shape: tuple[int, ...], batch_size: int) -> None:
        for name, module in model.named_modules():
            if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
                raise CompileError(f"operator dropout ({name}) is not supported: the fp32 host profile draws nothing")
        self.plan: HostPlan = plan_host(read_module(model, torch.zeros(1, *input_shape)), batch_size)
        self._shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        check_parameters(self.plan, self._shapes)
        ends = np.cumsum([math.prod(self._shapes[parameter.name]) for parameter in self.plan.parameters]).tolist()
        self._size: int = ends[-1]
        self._places = {p.name: slice(i, j) for p, i, j in zip(self.plan.parameters, [0, *ends], ends, strict=False)}
        self.input_shape = input_shape
        self._library = _load(self.plan)
        self._arenas = threading.local()

    def train(
        self,
        state: Tensors,
        inputs: npt.NDArray[np.generic],
        targets: npt.NDArray[np.integer[Any]],
        order: npt.NDArray[np.int64],
        learning_rate: float,
        momentum: float = 0.0,
    ) -> tuple[dict[str, Floats], float]:
        """Train on one client's samples: plain SGD on the mean loss of each batch, momentum from 0.

        Args:
            state: The model's tensors. Not changed.
            inputs: ``(N, ...)``, fp32.
            targets: ``(N,)``, in ``[0, num_classes)``.
            order: ``(epochs, count)``: which samples in which order; the last batch of a row may be smaller.
            learning_rate: Of SGD.
            momentum: In [0, 1).

        Returns:
            The tensors afterwards, and the sum of the losses of all samples, each before its own step; NaN if a weight
            became inf or NaN.

        Raises:
            ValueError: A shape, an index or a label does not fit.
        """
        inputs, targets = self._samples(inputs, targets)
        if order.ndim != 2 or (order.size and not 0 <= int(order.min()) <= int(order.max()) < len(inputs)):
            raise ValueError(f"order must hold rows of indices in [0, {len(inputs)})")
        order = np.ascontiguousarray(order, np.int64)
        before, after = self._state(state), np.empty(self._size, np.float32)
        start = after.ctypes.data
        loss = self._library.eft_train(
            self._arena(),
            _pointers(array.ctypes.data for array in before),
            _pointers(start + 4 * place.start for place in self._places.values()),
            *(ctypes.c_void_p(array.ctypes.data) for array in (inputs, targets, order)),
            *(ctypes.c_int64(size) for size in (order.shape[1], order.shape[0])),
            *(ctypes.c_float(value) for value in (learning_rate, momentum)),
        )
        trained = {name: after[self._places[name]].reshape(shape) for name, shape in self._shapes.items()}
        return trained, float(loss) if np.isfinite(after).all() else math.nan

    def evaluate(
        self, state: Tensors, inputs: npt.NDArray[np.generic], targets: npt.NDArray[np.integer[Any]]
    ) -> tuple[int, float]:
        """How many of the samples the model gets right, and the sum of their losses; arguments as for ``train``."""
        inputs, targets = self._samples(inputs, targets)
        before = self._state(state)
        right = ctypes.c_int64(0)
        loss = self._library.eft_evaluate(
            self._arena(),
            _pointers(array.ctypes.data for array in before),
            *(ctypes.c_void_p(array.ctypes.data) for array in (inputs, targets)),
            ctypes.c_int64(len(inputs)),
            ctypes.byref(right),
        )
        return right.value, float(loss)

    def _samples(
        self, inputs: npt.NDArray[np.generic], targets: npt.NDArray[np.integer[Any]]
    ) -> tuple[Floats, npt.NDArray[np.int64]]:
        if inputs.shape[1:] != self.input_shape or targets.shape != inputs.shape[:1]:
            raise ValueError(
                f"inputs have shape {inputs.shape}, targets {targets.shape}; expected (N, "
                f"{', '.join(map(str, self.input_shape))}) and (N,)"
            )
        if targets.size and not 0 <= int(targets.min()) <= int(targets.max()) < self.plan.num_classes:
            raise ValueError(
                f"targets run from {targets.min()} to {targets.max()}; they must be in [0, {self.plan.num_classes})"
            )
        return np.ascontiguousarray(inputs, np.float32), np.ascontiguousarray(targets, np.int64)

    def _state(self, state: Tensors) -> list[Floats]:
        """The tensors in the order of the plan."""
        if {name: tensor.shape for name, tensor in state.items()} != self._shapes:
            for name in sorted(set(state) | set(self._shapes)):
                found, expected = state[name].shape if name in state else "nothing", self._shapes.get(name, "nothing")
                if found != expected:
                    raise ValueError(f"tensor {name!r} has shape {found}, the model's has {expected}")
        return [np.ascontiguousarray(state[parameter.name], np.float32) for parameter in self.plan.parameters]

    def _arena(self) -> ctypes.c_void_p:
        """This thread's, from the first whole cache line."""
        if not hasattr(self._arenas, "floats"):
            self._arenas.floats = np.zeros(self.plan.arena_floats + 16, np.float32)
        return ctypes.c_void_p(-(-self._arenas.floats.ctypes.data // 64) * 64)


def _pointers(addresses: Iterable[int]) -> Any:
    found = tuple(addresses)
    return (ctypes.c_void_p * len(found))(*found)


def build_host_f32(plan: HostPlan, extra: tuple[str, ...] = ()) -> Path:
    """Compile a plan into a shared library, or find it in the cache.

    Args:
        plan: What to compile.
        extra: More options for the compiler.

    Raises:
        ToolError: There is no C compiler, or it failed.
    """
    sources = host_f32_sources(plan)
    # The cache may be shared by machines of several kinds, and the library is made for this one.
    sources["client.c"] = f"/* built for {_cpu()} */\n{sources['client.c']}"
    return build(host_toolchain(), sources, "libclient.so", (*_FLAGS, *extra))


def _load(plan: HostPlan) -> Any:
    path = build_host_f32(plan)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise ToolError(f"the library {path} cannot be loaded: {error}. Delete it to have it built again.") from error
    functions: tuple[tuple[Callable[..., Any], Any], ...] = (
        (library.eft_train, ctypes.c_double),
        (library.eft_evaluate, ctypes.c_double),
        (library.eft_arena_floats, ctypes.c_int64),
    )
    for function, result in functions:
        function.restype = result  # type: ignore[attr-defined]
    assert library.eft_arena_floats() == plan.arena_floats, "the library was built for another plan"
    return library


@cache
def _cpu() -> str:
    """What this processor can do, as a hash."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = [platform.processor()]
    wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    told = sorted({line for line in lines if line.split(":")[0].strip() in wanted}) or lines[:1]
    return hashlib.sha256("\n".join([platform.machine(), *told]).encode()).hexdigest()[:16]

"""The generated C as a shared library of this machine."""

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from efftrain.errors import ToolError
from efftrain.ondevice.backends.engine import Engine, Samples
from efftrain.ondevice.backends.toolchain import Kind, build, host_toolchain
from efftrain.ondevice.emit.c_source import CSource
from efftrain.ondevice.emit.project import runtime_sources

_ERRORS = {
    -1: "a pointer is NULL or a setting is out of its range",
    -2: "the number of bytes is not the model's",
    -3: "the label is not a class",
    -4: "the state holds a value that this model cannot have",
}
_LOOP = """
#include "$.h"
int32_t host_train($_context *c, const int8_t *xs, const int32_t *labels, int32_t count);
int32_t host_evaluate($_context *c, const int8_t *xs, const int32_t *labels, int32_t count);
int32_t host_train($_context *c, const int8_t *xs, const int32_t *labels, int32_t count)
{
    int32_t right = 0;
    for (int32_t i = 0; i < count; i++) {
        const int32_t result = $_train_step(c, xs + (int64_t)i * (int64_t)%INPUT_BYTES, %INPUT_BYTES, labels[i]);
        if (result < 0) {
            return result;
        }
        right += result == labels[i] ? 1 : 0;
    }
    return right;
}
int32_t host_evaluate($_context *c, const int8_t *xs, const int32_t *labels, int32_t count)
{
    int32_t right = 0;
    for (int32_t i = 0; i < count; i++) {
        const int32_t result = $_predict(c, xs + (int64_t)i * (int64_t)%INPUT_BYTES, %INPUT_BYTES);
        if (result < 0) {
            return result;
        }
        right += result == labels[i] ? 1 : 0;
    }
    return right;
}
"""


def build_library(name: str, code: CSource, kind: Kind = "auto") -> Path:
    """Compile a program into a shared library, or find it in the cache."""
    sources = {
        **runtime_sources(),
        f"{name}.h": code.header,
        f"{name}.c": code.source,
        "host.c": _LOOP.replace("$", name).replace("%", f"{name.upper()}_"),
    }
    return build(host_toolchain(kind), sources, f"lib{name}.so")


class HostEngine(Engine):
    """The program on this machine's processor; the context is a buffer of this object.

    Args:
        library: From ``build_library``.
        name: The program's prefix.
        input_shape: Height, width, channels.
        num_classes: Labels are in [0, num_classes).
        state_bytes: Length of the trained state.
        seed: Of the stochastic rounding.
    """

    def __init__(
        self, library: Path, name: str, input_shape: tuple[int, int, int], num_classes: int, state_bytes: int, seed: int
    ) -> None:
        super().__init__(input_shape, num_classes, state_bytes)
        try:
            self._library = ctypes.CDLL(str(library))
        except OSError as error:
            raise ToolError(
                f"the library {library} cannot be loaded: {error}. Delete it to have it built again."
            ) from error
        self._name = name
        self._context = ctypes.create_string_buffer(self._call_uint("context_bytes") + 8)
        self._pointer = ctypes.c_void_p(-(-ctypes.addressof(self._context) // 8) * 8)
        self._input_bytes = ctypes.c_uint32(int(np.prod(input_shape)))
        self._check(self._function("init")(self._pointer, ctypes.c_uint32(seed & 0xFFFFFFFF)))

    def state(self) -> bytes:
        """The trained state."""
        function = self._function("state")
        function.restype = ctypes.c_void_p
        return ctypes.string_at(function(self._pointer), self.state_bytes)

    def _load_state(self, state: bytes) -> None:
        self._check(self._function("load_state")(self._pointer, state, ctypes.c_uint32(len(state))))

    def _set_lr_shift(self, halvings: int) -> None:
        self._check(self._function("set_lr_shift")(self._pointer, ctypes.c_int32(halvings)))

    def _predict(self, x: Samples) -> int:
        return self._check(self._function("predict")(self._pointer, _address(x), self._input_bytes))

    def _train_step(self, x: Samples, label: int) -> int:
        step = self._function("train_step")
        return self._check(step(self._pointer, _address(x), self._input_bytes, ctypes.c_int32(label)))

    def _train(self, xs: Samples, labels: npt.NDArray[np.int32]) -> int:
        return self._loop("host_train", xs, labels)

    def _count_right(self, xs: Samples, labels: npt.NDArray[np.int32]) -> int:
        return self._loop("host_evaluate", xs, labels)

    def _loop(self, function: str, xs: Samples, labels: npt.NDArray[np.int32]) -> int:
        xs = np.ascontiguousarray(xs)
        return self._check(
            self._library[function](self._pointer, _address(xs), _address(labels), ctypes.c_int32(len(labels)))
        )

    def _function(self, suffix: str) -> Any:
        function = self._library[f"{self._name}_{suffix}"]
        function.restype = ctypes.c_int32
        return function

    def _call_uint(self, suffix: str) -> int:
        function = self._function(suffix)
        function.restype = ctypes.c_uint32
        return int(function())

    def _check(self, result: int) -> int:
        if result < 0:
            raise ValueError(f"{self._name}: {_ERRORS.get(result, f'error {result}')}")
        return result


def _address(array: npt.NDArray[np.int8] | npt.NDArray[np.int32]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)

"""What the tests of the C kernels share: the structures of eft.h, random layers, and the sums in plain integers."""

from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efftrain.ondevice.backends.kernels import BoardKernels, HostKernels, KernelMachine, Struct, Value
from efftrain.ondevice.backends.toolchain import host_instructions

Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Shape:
    """eft_conv_shape"""

    in_h: int
    in_w: int
    in_c: int
    out_h: int
    out_w: int
    out_c: int
    kernel_h: int
    kernel_w: int
    stride_h: int
    stride_w: int
    pad_h: int
    pad_w: int

    @property
    def struct(self) -> Struct:
        return Struct(*astuple(self))


@cache
def machine_of(name: str) -> KernelMachine:
    """``host`` or a processor, perhaps with a compiler behind it: ``cortex-m7 zig``; ``host plain`` has no AVX2."""
    cpu, _, kind = name.partition(" ")
    if cpu == "host":
        return HostKernels(extra=("-mno-avx2",) if kind == "plain" and host_instructions() else ())
    return BoardKernels(cpu, "zig" if kind == "zig" else "auto")


# --- arithmetic.md, section 1 -----------------------------------------------------------------------------------------


def plain_steps(lr_shift: int) -> Struct:
    """``eft_optimizer`` of SGD."""
    return Struct(lr_shift, None, 0, 0, 0, 0)


def rsh(value: Array, shift: int | Array) -> Array:
    v, s = np.broadcast_arrays(np.asarray(value, np.int64), np.asarray(shift, np.int64))
    right = np.clip(s, 1, 62)
    rounded = (v + (np.int64(1) << (right - 1))) >> right
    grown = np.clip(v, -(1 << 38), 1 << 38) * (np.int64(1) << np.clip(-s, 0, 24))
    return np.where(s > 62, 0, np.where(s > 0, rounded, grown))


def ceil_log2(value: int) -> int:
    return (value - 1).bit_length()


def hash32(value: Array) -> Array:
    x, low = np.atleast_1d(np.asarray(value)).astype(np.uint64), np.uint64(0xFFFFFFFF)
    x = (x ^ x >> np.uint64(16)) * np.uint64(0x7FEB352D) & low
    x = (x ^ x >> np.uint64(15)) * np.uint64(0x846CA68B) & low
    return (x ^ x >> np.uint64(16)).astype(np.int64).reshape(np.shape(value))


def step_key(seed: int, step: int) -> int:
    return int(hash32(np.array((seed + step * 0x9E3779B9) & 0xFFFFFFFF)))


def bits_of(mask: npt.NDArray[np.uint8], count: int) -> npt.NDArray[np.bool_]:
    return np.unpackbits(mask, count=count, bitorder="little").astype(bool)


# --- one layer --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Product:
    """A place of the kernel on a place of the input, for one place of the output."""

    oy: int
    ox: int
    ky: int
    kx: int
    iy: int
    ix: int


class Case:
    """One convolution with random contents; extremes are drawn often.

    ``groups`` is 1 for a dense one and 0 for a depthwise one; channels are drawn for each group.
    """

    def __init__(
        self,
        groups: int,
        sizes: tuple[int, ...],
        trained: float,
        zero: int,
        extreme: int,
        seed: int,
        any_border: bool = False,
    ) -> None:
        out_h, out_w, in_c, out_c, kh, kw, sh, sw, ph, pw, qh, qw, more_h, more_w = sizes
        if not any_border:  # each window has more than border
            ph, pw, qh, qw = min(ph, kh - 1), min(pw, kw - 1), min(qh, kh - 1), min(qw, kw - 1)
        in_h = max(1, kh - ph - qh, (out_h - 1) * sh + kh - ph - qh + min(more_h, sh - 1))
        in_w = max(1, kw - pw - qw, (out_w - 1) * sw + kw - pw - qw + min(more_w, sw - 1))
        out_h, out_w = (in_h + ph + qh - kh) // sh + 1, (in_w + pw + qw - kw) // sw + 1
        self.depthwise = groups == 0
        self.kind = "depthwise" if groups == 0 else "conv" if groups == 1 else "grouped"
        self.groups = groups or in_c
        self.pools = self.depthwise and not any_border
        self.group_c = 1 if self.depthwise else in_c
        in_c, out_c = (in_c, in_c) if self.depthwise else (groups * in_c, groups * out_c)
        self.s = Shape(in_h, in_w, in_c, out_h, out_w, out_c, kh, kw, sh, sw, ph, pw)
        self.rng = rng = np.random.default_rng(seed)
        self.zero = zero
        self.x = self.fill((in_h, in_w, in_c), -128, 127, extreme).astype(np.int8)
        filters = (kh, kw, in_c) if self.depthwise else (out_c, kh, kw, self.group_c)
        self.w = self.fill(filters, -127, 127, extreme).astype(np.int8)
        self.g = self.fill((out_h, out_w, out_c), -32767, 32767, extreme).astype(np.int16)
        self.g >>= rng.integers(0, 15) if extreme != 1 else 0
        self.bits = int(np.abs(self.g.astype(np.int64)).max()).bit_length()
        self.trained_c = round(trained * self.w.shape[-1])
        self.trained = np.ascontiguousarray(self.w[..., : self.trained_c])
        self.frozen = np.ascontiguousarray(self.w[..., self.trained_c :])
        self.multiplier = rng.integers(1 << 30, 1 << 31, out_c).astype(np.int32)
        self.shift = rng.integers(28, 45, out_c).astype(np.int8)
        self.factors = Struct(self.multiplier, self.shift)
        self.weights = Struct(self.trained, self.frozen, self.trained_c)
        self.mask = rng.integers(0, 256, (in_h * in_w * in_c + 7) // 8).astype(np.uint8)

    def fill(self, shape: tuple[int, ...], low: int, high: int, extreme: int) -> Array:
        if extreme == 1:
            return self.rng.choice(np.array([low, high]), shape)
        return self.rng.integers(low, high + 1, shape)

    @property
    def shape(self) -> tuple[Value, ...]:
        """What says it in a call: eft_conv_shape, and the groups."""
        return (self.s.struct, self.groups) if self.kind == "grouped" else (self.s.struct,)

    @property
    def num_places(self) -> int:
        """Of the kernel."""
        return self.s.kernel_h * self.s.kernel_w

    @property
    def gradient_terms(self) -> int:
        """Most products that meet in one input."""
        return self.num_places * (1 if self.depthwise else self.s.out_c // self.groups)

    def filters(self, ky: int, kx: int) -> Array:
        """Weights of one place of the kernel, (groups, outputs, inputs)."""
        w = self.w.astype(np.int64)
        at = w[ky, kx] if self.depthwise else w[:, ky, kx]
        return at.reshape(self.groups, self.s.out_c // self.groups, self.group_c)

    def whole(self) -> Struct:
        """eft_rows of a call for everything."""
        return Struct(0, self.s.out_h, self.s.in_h)

    def products(self) -> Iterator[Product]:
        """All that lie inside."""
        s = self.s
        for oy in range(s.out_h):
            for ky in range(s.kernel_h):
                iy = oy * s.stride_h - s.pad_h + ky
                for ox in range(s.out_w) if 0 <= iy < s.in_h else ():
                    for kx in range(s.kernel_w):
                        ix = ox * s.stride_w - s.pad_w + kx
                        if 0 <= ix < s.in_w:
                            yield Product(oy, ox, ky, kx, iy, ix)

    def sums(self) -> Array:
        """Of the forward pass, without bias."""
        s, q = self.s, self.x.astype(np.int64) - self.zero
        sums = np.zeros((s.out_h, s.out_w, s.out_c), np.int64)
        for p in self.products():
            sums[p.oy, p.ox] += (self.filters(p.ky, p.kx) @ q[p.iy, p.ix].reshape(self.groups, -1, 1)).ravel()
        return sums

    def input_sums(self, h: Array) -> Array:
        """Of the gradient with respect to the input, from scaled gradients of the output."""
        sums = np.zeros(self.x.shape, np.int64)
        for p in self.products():
            sums[p.iy, p.ix] += (h[p.oy, p.ox].reshape(self.groups, 1, -1) @ self.filters(p.ky, p.kx)).ravel()
        assert np.abs(sums).max() < 1 << 31
        return sums

    def weight_sums(self) -> tuple[Array, Array, int]:
        """Of the gradients with respect to the trained weights and the biases, and the cut."""
        s, q = self.s, self.x.astype(np.int64) - self.zero
        cut = max(0, self.bits - (23 - ceil_log2(s.out_h * s.out_w)))
        g = rsh(self.g.astype(np.int64), cut)
        sums = np.zeros(self.w.shape, np.int64)
        for p in self.products():
            if self.depthwise:
                sums[p.ky, p.kx] += g[p.oy, p.ox] * q[p.iy, p.ix]
            else:
                outer = g[p.oy, p.ox].reshape(self.groups, -1, 1) * q[p.iy, p.ix].reshape(self.groups, 1, -1)
                sums[:, p.ky, p.kx] += outer.reshape(s.out_c, -1)
        assert np.abs(sums).max() < 1 << 31
        return sums[..., : self.trained_c], g.sum((0, 1)), cut

    def passed(self, values: Array, mask: bool) -> Array:
        """Values of the input's shape, 0 where its mask is."""
        kept = bits_of(self.mask, values.size).reshape(values.shape)
        return np.where(kept, values, 0) if mask else values

    # --- tight overlap ------------------------------------------------------------------------------------------------

    def output_start(self, row_bytes: int, x_row_bytes: int) -> int:
        """Largest address of a forward output, relative to its input, that the contract allows."""
        s = self.s
        free = [(r, max(0, r * s.stride_h - s.pad_h)) for r in range(s.out_h)]
        return min(row * x_row_bytes - (r + 1) * row_bytes for r, row in free if row < s.in_h)

    def gradient_start(self, row_bytes: int, g_row_bytes: int) -> int:
        """Largest address of an input gradient, relative to the output's, that the contract allows."""
        s = self.s
        first = [(r, max(0, -(-(r + s.pad_h - s.kernel_h + 1) // s.stride_h))) for r in range(s.in_h)]
        return min((row * g_row_bytes - (r + 1) * row_bytes for r, row in first if row < s.out_h), default=0)


def place(source: np.ndarray, size: int, start: int, shift: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two buffers in one piece of memory.

    Args:
        source: Its copy is the first.
        size: Elements of the second, of the same type.
        start: Where the second starts, relative to the first, in elements.
        shift: Moves both, to addresses of any alignment.

    Returns:
        All the memory, with random elements around, the first buffer and the second.
    """
    margin = 8
    low = min(0, start)
    high = max(source.size, start + size)
    memory = np.random.default_rng(1).integers(-100, 100, high - low + 2 * margin).astype(source.dtype)
    first = memory[margin - low + shift :][: source.size]
    first[:] = source.ravel()
    return memory, first, memory[margin - low + shift + start :][:size]


_SMALL = st.tuples(
    *(st.integers(1, high) for high in (4, 5, 9, 5, 4, 4, 3, 3)), *(st.integers(0, high) for high in (3, 3, 3, 3, 2, 2))
)
# Few positions and many channels, so that blocks of any size are filled, and left half full.
_WIDE = st.tuples(
    *(st.integers(1, high) for high in (3, 5, 70, 70, 3, 3, 2, 2)),
    *(st.integers(0, high) for high in (1, 1, 1, 1, 1, 1)),
)
_POINTWISE = st.tuples(*(st.integers(1, high) for high in (3, 6, 140, 140)), *(st.just(v) for v in [1] * 4 + [0] * 6))
_SHARES = st.sampled_from([0.0, 0.3, 0.5, 1.0])
_REST = (_SHARES, st.sampled_from([-128, 0]), st.integers(0, 3), st.integers(0, 2**32 - 1))
# Groups of any size, also of one input or output.
_GROUP = st.tuples(
    *(st.integers(1, high) for high in (3, 5, 10, 30, 3, 3, 2, 2)),
    *(st.integers(0, high) for high in (2, 2, 2, 2, 1, 1)),
)
POOL = st.builds(Case, st.just(0), st.one_of(_SMALL, _WIDE), *_REST)
DENSE = st.builds(Case, st.just(1), st.one_of(_SMALL, _WIDE, _POINTWISE), *_REST, st.booleans())
DEPTHWISE = st.builds(Case, st.just(0), st.one_of(_SMALL, _WIDE), *_REST, st.booleans())
GROUPED = st.builds(Case, st.integers(2, 5), st.one_of(_SMALL, _GROUP), *_REST, st.booleans())
ANY_CASE = st.one_of(DENSE, DEPTHWISE, GROUPED)


_LONG = 10_000
# Cortex-M0+ has no SIMD instructions and no unaligned access.
_MACHINES = [
    pytest.param("host", 1.0, id="host"),
    pytest.param("host", None, id="host-long", marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
    *(
        pytest.param(name, 0.25, id=name, marks=pytest.mark.firmware)
        for name in ("cortex-m7", "cortex-m0plus", "cortex-m7 zig")
    ),
    pytest.param("host plain", 0.25, id="host-plain"),
]


def cases(*strategies: st.SearchStrategy[Any], examples: int = 150) -> Callable[[Callable[..., None]], Any]:
    """Make a test of a function of a machine and what the strategies draw."""

    def wrap(body: Callable[..., None]) -> Any:
        @pytest.mark.parametrize(("name", "share"), _MACHINES)
        def test(name: str, share: float | None) -> None:
            machine = machine_of(name)
            count = _LONG if share is None else round(examples * share)

            def check(drawn: tuple[Any, ...]) -> None:
                body(machine, *drawn)

            check.__name__ = "_".join([body.__name__, *name.replace("-", " ").split()])
            settings(max_examples=count, deadline=None)(given(st.tuples(*strategies))(check))()

        test.__name__, test.__doc__ = body.__name__, body.__doc__
        return test

    return wrap

"""Every C kernel against a slow reference in plain Python integers, on shapes that nobody chose."""

import ctypes
from collections.abc import Callable
from functools import cache

import numpy as np
import numpy.typing as npt
from hypothesis import given, settings
from hypothesis import strategies as st

from efftrain.ondevice.backends.simulator import hash32, rsh
from efftrain.ondevice.backends.toolchain import build, host_toolchain
from efftrain.ondevice.emit.project import runtime_sources
from efftrain.ondevice.quantize import ceil_log2

Array = npt.NDArray[np.int64]
I32 = ctypes.c_int32


class Shape(ctypes.Structure):
    _fields_ = [
        (name, I32)
        for name in (
            "in_h in_w in_c out_h out_w out_c kernel_h kernel_w stride_h stride_w pad_h pad_w".split()  # noqa: SIM905
        )
    ]

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


class Weights(ctypes.Structure):
    _fields_ = [("trained", ctypes.c_void_p), ("frozen", ctypes.c_void_p), ("trained_c", I32)]


class Factors(ctypes.Structure):
    _fields_ = [("multiplier", ctypes.c_void_p), ("shift", ctypes.c_void_p)]


class Requantize(ctypes.Structure):
    _fields_ = [("factors", Factors), ("zero_point", I32), ("pass_minimum", I32)]


class InputGrad(ctypes.Structure):
    _fields_ = [("channel_scale", ctypes.c_void_p), ("operand_bits", I32), ("shift", I32)]


class Gradient(ctypes.Structure):
    _fields_ = [("g", ctypes.c_void_p), ("bits", I32), ("exponent", I32)]


@cache
def runtime() -> ctypes.CDLL:
    return ctypes.CDLL(str(build(host_toolchain(), runtime_sources(), "libeft.so")))


def at(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


class Case:
    """One convolution with random contents; extremes are drawn often."""

    def __init__(self, sizes: tuple[int, ...], trained: float, relu_in: bool, extreme: int, seed: int) -> None:
        out_h, out_w, in_c, out_c, kh, kw, sh, sw, ph, pw, more_h, more_w = sizes
        ph, pw = min(ph, kh - 1), min(pw, kw - 1)
        in_h = max(1, (out_h - 1) * sh + kh - 2 * ph + min(more_h, sh - 1))
        in_w = max(1, (out_w - 1) * sw + kw - 2 * pw + min(more_w, sw - 1))
        out_h, out_w = (in_h + 2 * ph - kh) // sh + 1, (in_w + 2 * pw - kw) // sw + 1
        if out_h < 1 or out_w < 1:
            in_h, in_w, out_h, out_w = max(in_h, kh), max(in_w, kw), 1, 1
            out_h, out_w = (in_h + 2 * ph - kh) // sh + 1, (in_w + 2 * pw - kw) // sw + 1
        self.s = Shape(in_h, in_w, in_c, out_h, out_w, out_c, kh, kw, sh, sw, ph, pw)
        self.rng = rng = np.random.default_rng(seed)
        self.zero = -128 if relu_in else 0
        self.x = self.fill((in_h, in_w, in_c), -128, 127, extreme).astype(np.int8)
        self.w = self.fill((out_c, kh, kw, in_c), -127, 127, extreme).astype(np.int8)
        self.g = self.fill((out_h, out_w, out_c), -32767, 32767, extreme).astype(np.int16)
        self.g >>= rng.integers(0, 15) if extreme != 1 else 0
        self.bits = int(np.abs(self.g.astype(np.int64)).max()).bit_length()
        self.trained_c = round(trained * in_c)
        self.trained = np.ascontiguousarray(self.w[..., : self.trained_c])
        self.frozen = np.ascontiguousarray(self.w[..., self.trained_c :])
        self.multiplier = rng.integers(1 << 30, 1 << 31, out_c).astype(np.int32)
        self.shift = rng.integers(28, 45, out_c).astype(np.int16)
        self.factors = Factors(at(self.multiplier), at(self.shift))
        self.weights = Weights(at(self.trained), at(self.frozen), self.trained_c)
        self.mask = rng.integers(0, 256, (in_h * in_w * in_c + 7) // 8).astype(np.uint8)

    def fill(self, shape: tuple[int, ...], low: int, high: int, extreme: int) -> Array:
        if extreme == 1:
            return self.rng.choice(np.array([low, high]), shape)
        return self.rng.integers(low, high + 1, shape)

    def passes(self, index: int) -> bool:
        return bool(self.mask[index >> 3] >> (index & 7) & 1)

    def each_product(self) -> list[tuple[int, int, int, int, int, int]]:
        """Output row and column, kernel row and column, input row and column of all that lie inside."""
        s = self.s
        return [
            (oy, ox, ky, kx, oy * s.stride_h - s.pad_h + ky, ox * s.stride_w - s.pad_w + kx)
            for oy in range(s.out_h)
            for ox in range(s.out_w)
            for ky in range(s.kernel_h)
            for kx in range(s.kernel_w)
            if 0 <= oy * s.stride_h - s.pad_h + ky < s.in_h and 0 <= ox * s.stride_w - s.pad_w + kx < s.in_w
        ]

    def sums(self) -> Array:
        s, q, w = self.s, self.x.astype(np.int64) - self.zero, self.w.astype(np.int64)
        sums = np.zeros((s.out_h, s.out_w, s.out_c), np.int64)
        for oy, ox, ky, kx, iy, ix in self.each_product():
            sums[oy, ox] += w[:, ky, kx] @ q[iy, ix]
        return sums

    def weight_sums(self) -> tuple[Array, Array, int]:
        s, q = self.s, self.x.astype(np.int64) - self.zero
        cut = max(0, self.bits - (23 - ceil_log2(s.out_h * s.out_w)))
        g = rsh(self.g.astype(np.int64), np.int64(cut))
        sums = np.zeros(self.w.shape, np.int64)
        for oy, ox, ky, kx, iy, ix in self.each_product():
            sums[:, ky, kx] += np.outer(g[oy, ox], q[iy, ix])
        assert np.abs(sums).max() < 1 << 31
        return sums[..., : self.trained_c], g.sum((0, 1)), cut


SMALL = st.tuples(
    *(st.integers(1, high) for high in (4, 5, 9, 5, 4, 4, 3, 3)), *(st.integers(0, high) for high in (3, 3, 2, 2))
)
CASES = st.builds(
    Case, SMALL, st.sampled_from([0.0, 0.3, 1.0]), st.booleans(), st.integers(0, 3), st.integers(0, 2**32 - 1)
)


def cases(test: Callable[[Case], None]) -> Callable[[], None]:
    return settings(max_examples=120, deadline=None)(given(CASES)(test))


@cases
def test_conv(c: Case) -> None:
    s = c.s
    bias = c.rng.integers(-(2**30), 2**30 + 1, s.out_c).astype(np.int32)
    relu = bool(c.rng.integers(0, 2))
    out = Requantize(c.factors, -128 if relu else 0, -127 if relu else -128)
    y = np.zeros((s.out_h, s.out_w, s.out_c), np.int8)
    mask = np.zeros((y.size + 7) // 8, np.uint8)
    sums = c.sums() + bias
    assert np.abs(sums).max() < 1 << 31
    v = rsh(sums * c.multiplier, c.shift.astype(np.int64))
    want = np.clip(v, 0, 255) - 128 if relu else np.clip(v, -128, 127)
    passes = (v > 0) & (v <= 255) if relu else (v >= -128) & (v <= 127)
    for mask_at in (at(mask), None):
        runtime().eft_conv_s8(
            at(c.x), ctypes.byref(s), c.zero, ctypes.byref(c.weights), at(bias), ctypes.byref(out), at(y), mask_at
        )
        assert np.array_equal(y, want)
    assert np.array_equal(np.unpackbits(mask, count=y.size, bitorder="little"), passes.ravel())


@cases
def test_head(c: Case) -> None:
    logits = np.zeros(c.s.out_c, np.int16)
    bias = c.rng.integers(-(2**30), 2**30 + 1, c.s.out_c).astype(np.int32)
    runtime().eft_head_s8(
        at(c.x), ctypes.byref(c.s), c.zero, ctypes.byref(c.weights), at(bias), ctypes.byref(c.factors), at(logits)
    )
    v = rsh((c.sums()[0, 0] + bias) * c.multiplier, c.shift.astype(np.int64))
    assert np.array_equal(logits, np.clip(v, -32768, 32767))


@cases
def test_input_grad(c: Case) -> None:
    s = c.s
    scale = c.rng.integers(1, 32768, s.out_c).astype(np.int16)
    operand_bits = min(15, 24 - ceil_log2(s.out_c * s.kernel_h * s.kernel_w))
    constants = InputGrad(at(scale), operand_bits, int(c.rng.integers(-3, 14)))
    gx, scratch = np.zeros((s.in_h, s.in_w, s.in_c), np.int16), np.zeros(s.in_c, np.int32)
    use_mask = bool(c.rng.integers(0, 2))
    bits = runtime().eft_conv_input_grad_s16(
        at(c.g), c.bits, ctypes.byref(s), ctypes.byref(c.weights), ctypes.byref(constants),
        at(c.mask) if use_mask else None, at(gx), at(scratch),
    )  # fmt: skip
    h = rsh(c.g.astype(np.int64) * scale, np.int64(15 - (operand_bits - c.bits)))
    assert np.abs(h).max() <= 1 << operand_bits
    sums = np.zeros(gx.shape, np.int64)
    for oy, ox, ky, kx, iy, ix in c.each_product():
        sums[iy, ix] += h[oy, ox] @ c.w[:, ky, kx].astype(np.int64)
    assert np.abs(sums).max() < 1 << 31
    want = np.clip(rsh(sums, np.int64(constants.shift)), -32767, 32767).ravel()
    want = np.array([v if not use_mask or c.passes(i) else 0 for i, v in enumerate(want)])
    assert np.array_equal(gx.ravel(), want)
    assert bits == int(np.abs(want).max()).bit_length()


EXPONENTS = st.integers(-60, 20)


@settings(max_examples=120, deadline=None)
@given(CASES, EXPONENTS, st.integers(0, 31))
def test_master_update(c: Case, exponent: int, lr_shift: int) -> None:
    trained, residual = c.trained.copy(), c.rng.integers(-128, 128, c.trained.shape).astype(np.int8)
    sums, _, cut = c.weight_sums()
    master = 256 * trained.astype(np.int64) + residual
    gradient, scratch = Gradient(at(c.g), c.bits, exponent), np.zeros(max(1, c.trained_c), np.int32)
    runtime().eft_conv_update_master_s8(
        at(c.x), c.zero, ctypes.byref(gradient), ctypes.byref(c.s), ctypes.byref(c.factors), lr_shift,
        at(trained), at(residual), c.trained_c, at(scratch),
    )  # fmt: skip
    shift = c.shift.astype(np.int64) - (exponent + cut) - 16 + lr_shift
    t = rsh(sums * c.multiplier.astype(np.int64)[:, None, None, None], shift[:, None, None, None])
    master = np.clip(master - ((t + 128) >> 8), -32640, 32639)
    assert np.array_equal(256 * trained.astype(np.int64) + residual, master)
    assert (trained != -128).all()


@settings(max_examples=120, deadline=None)
@given(CASES, EXPONENTS, st.integers(0, 31))
def test_stochastic_update(c: Case, exponent: int, lr_shift: int) -> None:
    trained, before = c.trained.copy(), c.trained.astype(np.int64)
    sums, _, cut = c.weight_sums()
    gradient, scratch = Gradient(at(c.g), c.bits, exponent), np.zeros(max(1, c.trained_c), np.int32)
    seed, step, first = (int(v) for v in c.rng.integers(0, 2**32, 3))
    runtime().eft_step_key.restype = ctypes.c_uint32
    key = runtime().eft_step_key(ctypes.c_uint32(seed), ctypes.c_uint32(step))
    assert key == int(hash32((seed + step * 0x9E3779B9) & 0xFFFFFFFF))
    runtime().eft_conv_update_stochastic_s8(
        at(c.x), c.zero, ctypes.byref(gradient), ctypes.byref(c.s), ctypes.byref(c.factors), lr_shift,
        ctypes.c_uint32(key), ctypes.c_uint32(first), at(trained), c.trained_c, at(scratch),
    )  # fmt: skip
    index = (first + np.arange(c.w.size).reshape(c.w.shape)[..., : c.trained_c]) & 0xFFFFFFFF
    shift = c.shift.astype(np.int64) - (exponent + cut) - 16 + lr_shift
    t = rsh(sums * c.multiplier.astype(np.int64)[:, None, None, None], shift[:, None, None, None])
    assert np.array_equal(trained, np.clip(before - ((t + (hash32(key ^ index) >> 16)) >> 16), -127, 127))


@settings(max_examples=120, deadline=None)
@given(CASES, EXPONENTS, st.integers(0, 31))
def test_bias_update(c: Case, exponent: int, lr_shift: int) -> None:
    bias = c.rng.integers(-(2**30), 2**30 + 1, c.s.out_c).astype(np.int32)
    before = bias.astype(np.int64)
    _, sums, cut = c.weight_sums()
    gradient = Gradient(at(c.g), c.bits, exponent)
    runtime().eft_bias_update_s32(
        ctypes.byref(gradient), c.s.out_h * c.s.out_w, c.s.out_c, ctypes.byref(c.factors), lr_shift, at(bias)
    )
    t = rsh(sums * c.multiplier, c.shift.astype(np.int64) - (exponent + cut) - 16 + lr_shift)
    assert np.array_equal(bias, np.clip(before - ((t + 32768) >> 16), -(2**30), 2**30))


@cases
def test_global_average_and_its_gradient(c: Case) -> None:
    s, pixels = c.s, c.s.in_h * c.s.in_w
    y = np.zeros(s.in_c, np.int8)
    multiplier, shift = int(c.multiplier[0]), int(c.shift[0])
    runtime().eft_global_average_s8(at(c.x), pixels, s.in_c, c.zero, multiplier, shift, at(y))
    sums = (c.x.astype(np.int64) - c.zero).sum((0, 1))
    low, high = (0, 255) if c.zero else (-128, 127)
    assert np.array_equal(y, np.clip(rsh(sums * multiplier, np.int64(shift)), low, high) + c.zero)
    g, gx = c.rng.integers(-32767, 32768, s.in_c).astype(np.int16), np.zeros((pixels, s.in_c), np.int16)
    bits = runtime().eft_global_average_grad_s16(at(g), pixels, s.in_c, at(c.mask), at(gx))
    want = [int(g[i % s.in_c]) if c.passes(i) else 0 for i in range(gx.size)]
    assert gx.ravel().tolist() == want
    assert bits == max(map(abs, want)).bit_length()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(-32768, 32767), min_size=2, max_size=300), st.data())
def test_softmax_loss(logits: list[int], data: st.DataObject) -> None:
    label = data.draw(st.integers(0, len(logits) - 1))
    z, g = np.array(logits, np.int16), np.zeros(len(logits), np.int16)
    bits = runtime().eft_softmax_loss_s16(at(z), len(logits), label, at(g))
    powers = []
    for value in logits:
        d = max(logits) - value
        powers.append(0 if d >> 8 > 31 else int(65536 * 2.0 ** (-(d & 255) / 256) + 0.5) >> (d >> 8))
    p = [((e << 15) + sum(powers) // 2) // sum(powers) for e in powers]
    want = [max(-32767, min(32767, v - 32768 * (k == label))) for k, v in enumerate(p)]
    assert g.tolist() == want
    assert bits == max(map(abs, want)).bit_length()
    # And it is the softmax. A power is off by less than 1.5 units of 2^-16 (table and shift), the total of at least
    # 2^16 by 1.5 a class, the quotient by half a unit of 2^-15.
    real = np.exp2((np.array(logits) - max(logits)) / 256.0)
    bound = (1.5 * (len(logits) + 1) + 1) * 2.0**-16
    assert np.abs(np.array(p) / 32768 - real / real.sum()).max() <= bound
    assert runtime().eft_argmax_s16(at(z), len(logits)) == int(np.argmax(z))

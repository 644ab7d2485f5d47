"""The backward kernels and the updates in C against slow references, on shapes that nobody chose."""

import numpy as np
import pytest
from hypothesis import strategies as st

from efftrain.ondevice.backends.kernels import KernelMachine, Struct, Value
from tests.property.kernel_cases import (
    ANY_CASE,
    POOL,
    Array,
    Case,
    bits_of,
    cases,
    ceil_log2,
    hash32,
    machine_of,
    place,
    plain_steps,
    rsh,
    step_key,
)
from tests.property.test_ondevice_kernels import Forward


def bit_length(values: Array) -> int:
    return int(np.abs(values).max()).bit_length()


class InputGradient:
    """A convolution's constants, and what its input gradient must be."""

    def __init__(self, c: Case) -> None:
        s, rng = c.s, c.rng
        self.case = c
        self.scale = rng.integers(1, 32768, s.out_c).astype(np.int16)
        self.scale[rng.integers(0, s.out_c)] = 32767  # always there
        operand_bits = min(15, 24 - ceil_log2(c.gradient_terms))
        self.shift = int(rng.integers(-3, 14))
        self.constants = Struct(self.scale, operand_bits, self.shift)
        self.use_mask = bool(rng.integers(0, 2))
        h = rsh(c.g.astype(np.int64) * self.scale, 15 - (operand_bits - c.bits))
        assert np.abs(h).max() <= min(1 << operand_bits, 32767)
        values = np.clip(rsh(c.input_sums(h), self.shift), -32767, 32767)
        self.want = c.passed(values, self.use_mask)

    def compute(self, m: KernelMachine, g: np.ndarray, gx: np.ndarray) -> int:
        c = self.case
        scratch = np.full(c.s.in_c + 2, -7, np.int32)
        bits = m.call(
            f"eft_{c.kind}_input_grad_s16",
            g, c.bits, *c.shape, c.weights, self.constants,
            c.mask if self.use_mask else None, gx, scratch[1:],
        )  # fmt: skip
        assert scratch[0] == -7, "more scratch was used than the contract says"
        assert scratch[-1] == -7, "more scratch was used than the contract says"
        return int(bits)


@cases(ANY_CASE)
def test_input_gradients(m: KernelMachine, c: Case) -> None:
    gradient, gx = InputGradient(c), np.zeros(c.x.shape, np.int16)
    bits = gradient.compute(m, c.g, gx)
    assert np.array_equal(gx, gradient.want)
    assert bits == bit_length(gradient.want)


class PoolGradient:
    """What the gradient of a max pool must be: the first position with the largest value takes all."""

    def __init__(self, c: Case) -> None:
        s, rng = c.s, c.rng
        self.case = c
        if rng.integers(0, 2):
            c.x[:] = c.x >> 6  # few values, so that equals are the rule
        self.shift = ceil_log2(-(-s.kernel_h // s.stride_h)) + ceil_log2(-(-s.kernel_w // s.stride_w))
        self.use_mask = bool(rng.integers(0, 2))
        best: dict[tuple[int, int, int], tuple[int, int, int]] = {}
        for p in c.products():
            for k in range(s.in_c):
                value = int(c.x[p.iy, p.ix, k])
                if (p.oy, p.ox, k) not in best or value > best[p.oy, p.ox, k][0]:
                    best[p.oy, p.ox, k] = (value, p.iy, p.ix)
        sums = np.zeros(c.x.shape, np.int64)
        for (oy, ox, k), (_, iy, ix) in best.items():
            sums[iy, ix, k] += c.g[oy, ox, k]
        self.want = c.passed(np.clip(rsh(sums, self.shift), -32767, 32767), self.use_mask)

    def compute(self, m: KernelMachine, g: np.ndarray, gx: np.ndarray) -> int:
        c = self.case
        mask = c.mask if self.use_mask else None
        return int(
            m.call("eft_max_pool_grad_s16", g, c.x, c.s.struct, self.shift, mask, gx),
        )


@cases(POOL)
def test_max_pool_gradient(m: KernelMachine, c: Case) -> None:
    gradient, gx = PoolGradient(c), np.zeros(c.x.shape, np.int16)
    bits = gradient.compute(m, c.g, gx)
    assert np.array_equal(gx, gradient.want)
    assert bits == bit_length(gradient.want)


@cases(ANY_CASE, st.booleans(), st.integers(0, 3), st.integers(0, 3), examples=300)
def test_an_input_gradient_may_lie_over_the_rows_before_those_it_needs(
    m: KernelMachine, c: Case, pool: bool, shift: int, slack: int
) -> None:
    gradient = PoolGradient(c) if pool and c.pools else InputGradient(c)
    start = c.gradient_start(c.s.in_w * c.s.in_c, c.s.out_w * c.s.out_c) - slack
    memory, g, gx = place(c.g, c.x.size, start, shift)
    before = memory.copy()
    bits = gradient.compute(m, g, gx)
    assert np.array_equal(gx, gradient.want.ravel())
    assert bits == bit_length(gradient.want)
    gx[:] = 0
    before[(gx.ctypes.data - memory.ctypes.data) // 2 :][: gx.size] = 0
    assert np.array_equal(memory, before), "something outside the gradient was written"


@cases(st.integers(1, 70), st.integers(0, 2**32 - 1), st.booleans(), st.booleans(), examples=200)
def test_table_gradient(m: KernelMachine, count: int, seed: int, use_mask: bool, in_place: bool) -> None:
    rng = np.random.default_rng(seed)
    g, slope = (rng.integers(-32768, 32768, size).astype(np.int16) for size in (count, 256))
    g = np.maximum(g, -32767).astype(np.int16)
    x = rng.integers(-128, 128, count).astype(np.int8)
    mask = rng.integers(0, 256, (count + 7) // 8).astype(np.uint8)
    g_bits = bit_length(g.astype(np.int64))
    want = np.clip(rsh(g.astype(np.int64) * slope[x.astype(np.int64) + 128], g_bits), -32767, 32767)
    want = np.where(bits_of(mask, count), want, 0) if use_mask else want
    gx = g if in_place else np.zeros(count, np.int16)
    bits = m.call("eft_table_grad_s16", g, g_bits, x, slope, count, mask if use_mask else None, gx)
    assert np.array_equal(gx, want)
    assert bits == bit_length(want)


@cases(
    st.integers(1, 70), st.integers(0, 2**32 - 1), st.integers(0, 15), st.integers(0, 15), st.integers(-60, 20),
    st.integers(-40, 40), st.integers(0, 62), st.sampled_from(["a", "b", "new"]), st.booleans(), st.booleans(),
    examples=300,
)  # fmt: skip
def test_gradient_sum(
    m: KernelMachine, count: int, seed: int, bits_a: int, bits_b: int, exponent: int, apart: int, shift: int,
    into: str, both: bool, use_mask: bool,
) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)
    a, b = (
        np.clip(rng.integers(-(1 << bits), (1 << bits) + 1, count), 1 - (1 << bits), (1 << bits) - 1).astype(np.int16)
        for bits in (bits_a, bits_b)
    )
    bits_a, bits_b = bit_length(a.astype(np.int64)), bit_length(b.astype(np.int64))
    mask = rng.integers(0, 256, (count + 7) // 8).astype(np.uint8)
    multiplier = 0 if rng.integers(0, 10) == 0 else int(rng.integers(1 << 30, 1 << 31))
    exponent_b = exponent + apart
    tops = [exponent + bits_a] if bits_a else []
    if both:
        tops += [exponent_b + bits_b + 31 - shift] if bits_b else []
        e = max(tops) - 14 if tops else exponent
        want = rsh(a.astype(np.int64), e - exponent)
        want = want + rsh(b.astype(np.int64) * multiplier, e - exponent_b + shift)
        want = np.clip(want, -32767, 32767)
    else:
        e, want = exponent, a.astype(np.int64)
    want = np.where(bits_of(mask, count), want, 0) if use_mask else want
    first, second = Struct(a, bits_a, exponent), Struct(b, bits_b, exponent_b)
    g = {"a": a, "b": b, "new": np.zeros(count, np.int16)}[into]
    found = np.zeros(1, np.int32)
    bits = m.call("eft_gradient_sum_s16", first, second if both else None, multiplier, shift, count,
        mask if use_mask else None, g, found,
    )  # fmt: skip
    assert np.array_equal(g, want)
    assert bits == bit_length(want)
    assert found[0] == e


EXPONENTS = st.integers(-60, 20)


class Update:
    """What both kinds of update of trained weights take."""

    def __init__(self, c: Case, exponent: int, lr_shift: int) -> None:
        sums, _, cut = c.weight_sums()
        shift = c.shift.astype(np.int64) - (exponent + cut) - 16 + lr_shift
        multiplier = c.multiplier.astype(np.int64)
        if c.depthwise:
            self.steps = rsh(sums * multiplier[: c.trained_c], shift[: c.trained_c])
        else:
            self.steps = rsh(sums * multiplier[:, None, None, None], shift[:, None, None, None])
        self.gradient = Struct(c.g, c.bits, exponent)
        self.scratch = np.full(c.trained_c + 1, -7, np.int32)
        self.scratch_if_depthwise = (self.scratch,) if c.depthwise else ()
        self.arguments: tuple[Value, ...] = (
            c.x, c.zero, self.gradient, *c.shape, c.factors, plain_steps(lr_shift),
        )  # fmt: skip


@cases(ANY_CASE, EXPONENTS, st.integers(0, 31))
def test_master_update(m: KernelMachine, c: Case, exponent: int, lr_shift: int) -> None:
    update = Update(c, exponent, lr_shift)
    trained, residual = c.trained.copy(), c.rng.integers(-128, 128, c.trained.shape).astype(np.int8)
    master = np.clip(256 * trained.astype(np.int64) + residual - ((update.steps + 128) >> 8), -32640, 32639)
    m.call(
        f"eft_{c.kind}_update_master_s8",
        *update.arguments,
        trained,
        residual,
        c.trained_c,
        *update.scratch_if_depthwise,
    )
    assert np.array_equal(256 * trained.astype(np.int64) + residual, master)
    assert (trained != -128).all()
    assert update.scratch[-1] == -7


@cases(ANY_CASE, EXPONENTS, st.integers(0, 32767), st.integers(0, 6), st.integers(0, 15), st.booleans(), examples=200)
def test_an_update_keeps_what_its_optimizer_needs(
    m: KernelMachine, c: Case, exponent: int, decay: int, batch_shift: int, drop: int, last: bool
) -> None:
    update = Update(c, exponent, 0)
    trained, residual = c.trained.copy(), np.zeros(c.trained.shape, np.int8)
    kept = c.rng.integers(-(1 << 30), (1 << 30) + 1, c.trained.shape).astype(np.int32)
    limit = 1 << 30
    old = rsh(kept.astype(np.int64) * decay, 15) if decay else kept.astype(np.int64)
    total = np.clip(old + np.clip(rsh(update.steps, drop), -limit, limit), -limit, limit)
    move = total << drop if decay else rsh(total << drop, batch_shift) if last else np.zeros_like(total)
    master = np.clip(256 * trained.astype(np.int64) - ((move + 128) >> 8), -32640, 32639)
    arguments = (*update.arguments[:-1], Struct(0, kept, drop, decay, batch_shift, int(last)))
    m.call(f"eft_{c.kind}_update_master_s8", *arguments, trained, residual, c.trained_c, *update.scratch_if_depthwise)
    assert np.array_equal(256 * trained.astype(np.int64) + residual, master)
    assert np.array_equal(kept, total if decay or not last else np.zeros_like(total))


@cases(ANY_CASE, EXPONENTS, st.integers(0, 31))
def test_stochastic_update(m: KernelMachine, c: Case, exponent: int, lr_shift: int) -> None:
    update = Update(c, exponent, lr_shift)
    trained, before = c.trained.copy(), c.trained.astype(np.int64)
    seed, step, first = (int(v) for v in c.rng.integers(0, 2**32, 3))
    key = m.call("eft_step_key", seed, step)
    key &= 0xFFFFFFFF
    assert key == step_key(seed, step)
    m.call(
        f"eft_{c.kind}_update_stochastic_s8",
        *update.arguments,
        key,
        first,
        trained,
        c.trained_c,
        *update.scratch_if_depthwise,
    )
    index = (first + np.arange(c.w.size).reshape(c.w.shape)[..., : c.trained_c]) & 0xFFFFFFFF
    want = np.clip(before - ((update.steps + (hash32(key ^ index) >> 16)) >> 16), -127, 127)
    assert np.array_equal(trained, want)
    assert update.scratch[-1] == -7


@pytest.mark.parametrize(
    ("groups", "sizes"),
    [
        pytest.param(1, (37, 34, 19, 50, 3, 3, 1, 1, 1, 1, 1, 1, 0, 0), id="more pixels than are kept at once"),
        pytest.param(1, (9, 7, 150, 70, 3, 3, 2, 1, 1, 1, 1, 1, 0, 0), id="more weights than are kept at once"),
        pytest.param(2, (9, 7, 100, 70, 5, 3, 2, 1, 1, 1, 1, 1, 0, 0), id="groups of more than a patch holds"),
        pytest.param(0, (40, 36, 33, 33, 7, 7, 1, 2, 3, 3, 3, 3, 0, 0), id="a large kernel"),
        pytest.param(0, (5, 300, 40, 40, 3, 5, 1, 1, 1, 2, 1, 2, 0, 0), id="lines that are too long"),
    ],
)
def test_large_layers(groups: int, sizes: tuple[int, ...]) -> None:
    """What the host prepares on its stack has an end: beyond it is other code, with the same bits."""
    m, c = machine_of("host"), Case(groups, sizes, 0.5, -128, 0, 7)
    forward, y = Forward(c), np.zeros((c.s.out_h, c.s.out_w, c.s.out_c), np.int8)
    forward.compute(m, c, c.x, c.whole(), y)
    assert np.array_equal(y, forward.want)
    gradient, gx = InputGradient(c), np.zeros(c.x.shape, np.int16)
    assert gradient.compute(m, c.g, gx) == bit_length(gradient.want)
    assert np.array_equal(gx, gradient.want)
    update, trained = Update(c, -12, 0), c.trained.copy()
    residual = np.zeros_like(trained)
    m.call(
        f"eft_{c.kind}_update_master_s8",
        *update.arguments,
        trained,
        residual,
        c.trained_c,
        *update.scratch_if_depthwise,
    )
    master = np.clip(256 * c.trained.astype(np.int64) - ((update.steps + 128) >> 8), -32640, 32639)
    assert np.array_equal(256 * trained.astype(np.int64) + residual, master)

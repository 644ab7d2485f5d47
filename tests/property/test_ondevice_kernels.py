"""The forward kernels, the loss and the bias update in C against slow references, on shapes that nobody chose."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from efftrain.ondevice.backends.kernels import KernelMachine, Struct
from tests.property.kernel_cases import (
    ANY_CASE,
    DENSE,
    POOL,
    Array,
    Case,
    bits_of,
    cases,
    machine_of,
    place,
    plain_steps,
    rsh,
)

Compute = Callable[[KernelMachine, Case, np.ndarray, Struct, np.ndarray], None]
"""Machine, case, input, rows, output."""


class Forward:
    """A convolution's constants, and what it must give."""

    def __init__(self, c: Case) -> None:
        s, rng = c.s, c.rng
        self.case = c
        self.bias = rng.integers(-(2**30), 2**30 + 1, s.out_c).astype(np.int32)
        if rng.integers(0, 2):  # small ones, or the sums hardly matter
            self.bias >>= 16
        relu = bool(rng.integers(0, 2))
        zero = int(rng.choice([-128, 0]))
        minimum = zero if relu else -128
        passing = minimum + 1 if relu else -128
        self.out = Struct(c.factors, zero, minimum, passing)
        sums = c.sums() + self.bias
        assert np.abs(sums).max() < 1 << 31
        v = rsh(sums * c.multiplier, c.shift.astype(np.int64)) + zero
        self.want = np.clip(v, minimum, 127)
        self.passes = (v >= passing) & (v <= 127)
        self.mask = rng.integers(0, 256, (v.size + 7) // 8).astype(np.uint8)

    def compute(
        self, m: KernelMachine, c: Case, x: np.ndarray, rows: Struct, y: np.ndarray, mask: np.ndarray | None = None
    ) -> None:
        m.call(
            f"eft_{c.kind}_s8",
            x, *c.shape, c.zero, c.weights, self.bias, self.out,
            rows, y, mask,
        )  # fmt: skip


@cases(ANY_CASE)
def test_convolutions(m: KernelMachine, c: Case) -> None:
    forward = Forward(c)
    y = np.zeros(forward.want.shape, np.int8)
    forward.compute(m, c, c.x, c.whole(), y)
    assert np.array_equal(y, forward.want)
    y[:], mask = 0, forward.mask.copy()
    forward.compute(m, c, c.x, c.whole(), y, mask)
    assert np.array_equal(y, forward.want)
    assert np.array_equal(bits_of(mask, y.size), forward.passes.ravel())
    assert mask[-1] >> (y.size % 8 or 8) == forward.mask[-1] >> (y.size % 8 or 8)


@cases(ANY_CASE)
def test_only_the_bits_of_the_computed_rows_change(m: KernelMachine, c: Case) -> None:
    forward = Forward(c)
    first = int(c.rng.integers(0, c.s.out_h))
    count = int(c.rng.integers(0, c.s.out_h - first + 1))
    y, mask = np.zeros((count, *forward.want.shape[1:]), np.int8), forward.mask.copy()
    forward.compute(m, c, c.x, Struct(first, count, c.s.in_h), y, mask)
    assert np.array_equal(y, forward.want[first : first + count])
    want = bits_of(forward.mask, forward.want.size).reshape(forward.want.shape)
    want[first : first + count] = forward.passes[first : first + count]
    assert np.array_equal(bits_of(mask, want.size), want.ravel())


def compute_pool(m: KernelMachine, c: Case, x: np.ndarray, rows: Struct, y: np.ndarray) -> None:
    m.call("eft_max_pool_s8", x, c.s.struct, rows, y)


def pooled(c: Case) -> Array:
    largest = np.full((c.s.out_h, c.s.out_w, c.s.out_c), -128, np.int64)
    for p in c.products():
        largest[p.oy, p.ox] = np.maximum(largest[p.oy, p.ox], c.x[p.iy, p.ix])
    return largest


def forward_of(c: Case, pool: bool) -> tuple[Compute, Array]:
    if pool:
        return compute_pool, pooled(c)
    forward = Forward(c)
    return forward.compute, forward.want


@cases(POOL)
def test_max_pool(m: KernelMachine, c: Case) -> None:
    y = np.zeros((c.s.out_h, c.s.out_w, c.s.out_c), np.int8)
    compute_pool(m, c, c.x, c.whole(), y)
    assert np.array_equal(y, pooled(c))


@cases(ANY_CASE, st.booleans(), st.integers(0, 20), examples=300)
def test_rows_through_a_ring_are_the_rows_of_the_whole(m: KernelMachine, c: Case, pool: bool, more: int) -> None:
    compute, want = forward_of(c, pool and c.pools)
    s, ring = c.s, min(c.s.in_h, c.s.kernel_h + more)
    kept = c.rng.integers(-128, 128, (ring, s.in_w, s.in_c)).astype(np.int8)
    y = np.zeros(want.shape, np.int8)
    first = arrived = 0
    while first < s.out_h:
        count, start = 0, max(0, first * s.stride_h - s.pad_h)

        def end(count: int, first: int = first) -> int:
            return min(s.in_h, max(0, (first + count - 1) * s.stride_h - s.pad_h + s.kernel_h))

        most = int(c.rng.integers(1, s.out_h + 1))
        while first + count < s.out_h and count < most and end(count + 1) - start <= ring:
            count += 1
        assert count, "a ring of kernel_h rows must do"
        while arrived < end(count):
            kept[arrived % ring] = c.x[arrived]
            arrived += 1
        compute(m, c, kept, Struct(first, count, ring), y[first:])
        first += count
    assert np.array_equal(y, want)


@cases(ANY_CASE, st.booleans(), st.integers(0, 3), st.integers(0, 3), st.booleans(), examples=300)
def test_an_output_may_lie_over_the_input_rows_before_its_own(
    m: KernelMachine, c: Case, pool: bool, shift: int, slack: int, in_parts: bool
) -> None:
    compute, want = forward_of(c, pool and c.pools)
    row = c.s.out_w * c.s.out_c
    start = c.output_start(row, c.s.in_w * c.s.in_c) - slack
    memory, x, y = place(c.x, want.size, start, shift)
    before = memory.copy()
    if in_parts:
        for r in range(c.s.out_h):
            compute(m, c, x, Struct(r, 1, c.s.in_h), y[r * row :])
    else:
        compute(m, c, x, c.whole(), y)
    assert np.array_equal(y, want.ravel())
    y[:] = 0
    before[(y.ctypes.data - memory.ctypes.data) :][: y.size] = 0
    assert np.array_equal(memory, before), "something outside the output was written"


@cases(DENSE)
def test_head(m: KernelMachine, c: Case) -> None:
    logits = np.zeros(c.s.out_c, np.int16)
    bias = c.rng.integers(-(2**30), 2**30 + 1, c.s.out_c).astype(np.int32)
    m.call("eft_head_s8", c.x, c.s.struct, c.zero, c.weights, bias, c.factors, logits)
    v = rsh((c.sums()[0, 0] + bias) * c.multiplier, c.shift.astype(np.int64))
    assert np.array_equal(logits, np.clip(v, -32768, 32767))


@cases(
    st.integers(1, 70),
    st.integers(0, 2**32 - 1),
    st.integers(0, 9),
    st.sampled_from([None, "x", "z", "x-", "z-"]),
    examples=300,
)
def test_add(m: KernelMachine, count: int, seed: int, distance: int, over: str | None) -> None:
    rng = np.random.default_rng(seed)
    zeros = rng.choice([-128, 0], 3).tolist()
    relu = bool(rng.integers(0, 2))
    minimum = zeros[2] if relu else -128
    passing = minimum + 1 if relu else -128
    limit = int(rng.choice([2**21, 2**12]))
    mx, mz = (int(m) for m in rng.integers(0, limit, 2))
    shift = int(rng.integers(1, 31))
    constants = Struct(zeros[0], mx, zeros[1], mz, shift, zeros[2], minimum, passing)
    x, z = (rng.choice([-128, 127], count) if rng.integers(0, 4) == 0 else rng.integers(-128, 128, count) for _ in "xz")
    v = rsh((x - zeros[0]) * mx + (z - zeros[1]) * mz, shift) + zeros[2]
    x, z, y = x.astype(np.int8), z.astype(np.int8), np.zeros(count, np.int8)
    if over:
        _, source, y = place(x if over[0] == "x" else z, count, -distance if over[-1] == "-" else 0, distance & 3)
        x, z = (source, z) if over[0] == "x" else (x, source)
    mask = rng.integers(0, 256, (count + 7) // 8).astype(np.uint8) if rng.integers(0, 2) else None
    m.call("eft_add_s8", x, z, constants, count, y, mask)
    assert np.array_equal(y, np.clip(v, minimum, 127))
    if mask is not None:
        assert np.array_equal(bits_of(mask, count), (v >= passing) & (v <= 127))


@cases(st.integers(1, 70), st.integers(0, 2**32 - 1), st.integers(0, 9), examples=100)
def test_table(m: KernelMachine, count: int, seed: int, distance: int) -> None:
    rng = np.random.default_rng(seed)
    x, table = (rng.integers(-128, 128, size).astype(np.int8) for size in (count, 256))
    _, source, y = place(x, count, -distance, distance & 3)
    m.call("eft_table_s8", source, table, count, y)
    assert np.array_equal(y, table[x.astype(np.int64) + 128])


@cases(ANY_CASE, st.integers(-60, 20), st.integers(0, 31), examples=120)
def test_bias_update(m: KernelMachine, c: Case, exponent: int, lr_shift: int) -> None:
    bias = c.rng.integers(-(2**30), 2**30 + 1, c.s.out_c).astype(np.int32)
    before = bias.astype(np.int64)
    _, sums, cut = c.weight_sums()
    gradient = Struct(c.g, c.bits, exponent)
    m.call(
        "eft_bias_update_s32",
        gradient,
        c.s.out_h * c.s.out_w,
        c.s.out_c,
        c.factors,
        plain_steps(lr_shift),
        bias,
    )
    t = rsh(sums * c.multiplier, c.shift.astype(np.int64) - (exponent + cut) - 16 + lr_shift)
    assert np.array_equal(bias, np.clip(before - ((t + 32768) >> 16), -(2**30), 2**30))
    # The same where only moves are kept.
    base, moved = before.astype(np.int32), c.rng.integers(-(2**15), 2**15, c.s.out_c).astype(np.int16)
    output_shift = c.rng.integers(1, 63, c.s.out_c).astype(np.int8)
    unit = np.clip(output_shift.astype(np.int64) - 39, 0, 15)
    m.call("eft_moved_bias_s32", base, moved, output_shift, c.s.out_c, bias)
    assert np.array_equal(bias, np.clip(before + moved * (1 << unit), -(2**30), 2**30))
    want = np.clip(moved - ((t + (1 << (15 + unit))) >> (16 + unit)), -(2**15), 2**15 - 1)
    sizes = (c.s.out_h * c.s.out_w, c.s.out_c)
    m.call("eft_moved_bias_update_s16", gradient, *sizes, c.factors, plain_steps(lr_shift), output_shift, moved)
    assert np.array_equal(moved, want)


@cases(ANY_CASE)
def test_global_average_and_its_gradient(m: KernelMachine, c: Case) -> None:
    s, pixels = c.s, c.s.in_h * c.s.in_w
    y = np.zeros(s.in_c, np.int8)
    multiplier, shift = int(c.multiplier[0]), int(c.shift[0])
    m.call("eft_global_average_s8", c.x, pixels, s.in_c, c.zero, multiplier, shift, y)
    sums = (c.x.astype(np.int64) - c.zero).sum((0, 1))
    assert np.array_equal(y, np.clip(rsh(sums * multiplier, shift) + c.zero, -128, 127))
    g, gx = c.rng.integers(-32767, 32768, s.in_c).astype(np.int16), np.zeros(c.x.shape, np.int16)
    mask = bool(c.rng.integers(0, 2))
    bits = m.call("eft_global_average_grad_s16", g, pixels, s.in_c, c.mask if mask else None, gx)
    want = c.passed(np.broadcast_to(g.astype(np.int64), gx.shape), mask)
    assert np.array_equal(gx, want)
    assert bits == int(np.abs(want).max()).bit_length()


@cases(st.lists(st.integers(-32768, 32767), min_size=2, max_size=300), st.data(), examples=200)
def test_softmax_loss(m: KernelMachine, logits: list[int], data: st.DataObject) -> None:
    label = data.draw(st.integers(0, len(logits) - 1))
    z, g = np.array(logits, np.int16), np.zeros(len(logits), np.int16)
    bits = m.call("eft_softmax_loss_s16", z, len(logits), label, g)
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
    assert m.call("eft_argmax_s16", z, len(logits)) == int(np.argmax(z))


def test_copy() -> None:
    m = machine_of("host")
    source: npt.NDArray[np.uint8] = np.random.default_rng(0).integers(0, 256, 37).astype(np.uint8)
    for count in range(30):
        for start in range(4):
            target = np.zeros(37, np.uint8)
            m.call("eft_copy", target[start:], source[3:], count)
            assert np.array_equal(target[start : start + count], source[3 : 3 + count])
            assert not target[:start].any()
            assert not target[start + count :].any()

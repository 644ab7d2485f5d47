"""What must hold for every codec, every tensor and every string of bytes."""

import math
import random
import re
import struct
import zlib

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings

from efftrain.compression import (
    Codec,
    Deflate,
    Feedback,
    Fp8,
    Half,
    Identity,
    Int8,
    IntN,
    LowRank,
    Mx,
    RandomK,
    Sign,
    Ternary,
    Threshold,
    TopK,
    codec_of,
    decode,
    format_codec,
    orthonormalize,
    parse_codec,
)
from efftrain.compression.compact import add_slot, fill_slot, slot_bytes
from efftrain.compression.entries import Entries
from efftrain.compression.indices import decode_indices, encode_indices, index_bytes
from efftrain.compression.sparsify import largest
from efftrain.errors import ConfigError, NonFiniteError, PayloadError

Floats = npt.NDArray[np.float32]

CODECS: list[Codec] = [
    Identity(),
    Int8(),
    Int8(block=7),
    Int8(block=16, rounding="stochastic"),
    TopK(0.01),
    TopK(0.3),
    TopK(1.0),
    TopK(0.1) >> Int8(block=5),
    TopK(0.1, dense_below=30) >> Int8(block=5),
    Half("fp16"),
    Half("bf16"),
    IntN(4),
    IntN(2, block=9),
    IntN(4, block=16, rounding="stochastic"),
    Sign(),
    Sign(block=11),
    Ternary(),
    Ternary(block=13, clip=2.5),
    Fp8("e4m3", block=12),
    Fp8("e5m2"),
    Mx("e4m3"),
    Mx("e5m2"),
    Mx("e3m2"),
    Mx("e2m3"),
    Mx("e2m1"),
    Mx("int8"),
    RandomK(0.1),
    RandomK(0.5) >> IntN(4, block=8),
    Threshold(0.1, sample=0.5),
    Threshold(0.02) >> Half("bf16"),
    TopK(0.2) >> Half("fp16"),
    TopK(0.2) >> Ternary(block=6),
    TopK(0.2) >> Mx("e2m1"),
    LowRank(),
    LowRank(1),
    LowRank(7),
    Int8(block=16) >> Deflate(),
    IntN(2, block=9) >> Deflate(6),
    TopK(0.1) >> Int8(block=5) >> Deflate(9),
    Identity() >> Deflate(),
]
# What rounds an element to nearest (or sends it whole, or not at all) loses nothing, to the bit: the difference of two
# numbers within a factor of two is exact. A number replaced by one much larger or of another sign leaves an error of
# half an ulp of the larger.
INEXACT = [c for c in CODECS if any(name in str(c) for name in ("stochastic", "Sign", "Ternary", "LowRank"))]


def codecs() -> st.SearchStrategy[Codec]:
    return st.sampled_from(CODECS)


def tensors(max_size: int = 400, largest_value: float = 1e30) -> st.SearchStrategy[Floats]:
    bound = float(np.float32(largest_value))
    elements = st.floats(-bound, bound, width=32, allow_nan=False, allow_subnormal=True)
    return hnp.arrays(np.float32, st.integers(0, max_size), elements=elements)


@settings(max_examples=400)
@given(codecs(), tensors())
def test_the_size_is_known_before(codec: Codec, x: Floats) -> None:
    num_bytes, known = codec.encode(x).num_bytes, codec.encoded_bytes(x.size)
    assert num_bytes == known if codec.fixed_size else num_bytes <= known


@settings(max_examples=400)
@given(codecs(), tensors(), st.integers(0, 2**32))
def test_encoding_repeats_and_the_message_names_its_codec(codec: Codec, x: Floats, key: int) -> None:
    payload = codec.encode(x, key=key)
    assert payload == codec.encode(x.copy(), key=key)
    assert codec_of(payload) == codec
    np.testing.assert_array_equal(decode(bytes(payload)), codec.decode(payload))


@given(tensors())
def test_identity_is_exact(x: Floats) -> None:
    np.testing.assert_array_equal(Identity().decode(Identity().encode(x)), x)


@given(tensors(), st.integers(1, 40))
def test_int8_errs_by_half_a_level(x: Floats, block: int) -> None:
    codec = Int8(block=block)
    y = codec.decode(codec.encode(x))
    padded = np.zeros(-(-x.size // block) * block, np.float64)
    padded[: x.size] = np.abs(x)
    scale = np.repeat(padded.reshape(-1, block).max(axis=1, initial=0) / 127, block)[: x.size]
    # Half a level, and the rounding of scale and product in fp32; below 2**-140 the scale itself has few bits.
    assert (np.abs(y.astype(np.float64) - x) <= scale * (0.5 + 1e-4) + 2.0**-140 * 127).all()


@settings(max_examples=400)
@pytest.mark.parametrize(
    ("codec", "error"),
    [
        (Half("fp16"), 2.0**-11),
        (Half("bf16"), 2.0**-8),
        (Fp8("e4m3", block=1), 2.0**-4),
        (Fp8("e5m2", block=1), 2.0**-3),
        (Mx("e4m3"), 2.0**-3),
        (Mx("e2m3"), 2.0**-4),
        (Mx("int8"), 2.0**-7),
        (IntN(4, block=1), 1e-6),
        (IntN(2, block=1), 1e-6),
    ],
    ids=str,
)
@given(st.floats(2.0**-13, 2.0**13, width=32), st.booleans())
def test_relative_error_of_the_largest_of_a_block(codec: Codec, error: float, x: float, negative: bool) -> None:
    value = np.array([-x if negative else x], np.float32)
    assert abs(codec.decode(codec.encode(value))[0] - value[0]) <= error * abs(value[0])


def test_half_sends_what_is_too_large_as_its_largest_number() -> None:
    x = np.array([1e6, -1e6, 65519.0, 3.4e38, -1e-9], np.float32)
    assert Half("fp16").decode(Half("fp16").encode(x)).tolist() == [65504, -65504, 65504, 65504, 0]
    assert np.isfinite(Half("bf16").decode(Half("bf16").encode(np.full(1, 3.4028235e38, np.float32)))).all()


@given(tensors(100, 1e6), st.integers(1, 40))
def test_sign_sends_sign_and_mean_magnitude(x: Floats, block: int) -> None:
    y = Sign(block).decode(Sign(block).encode(x))
    for start in range(0, x.size, block):
        part, sent = x[start : start + block].astype(np.float64), y[start : start + block]
        np.testing.assert_allclose(np.abs(sent), np.abs(part).mean(), rtol=1e-6, atol=1e-45)
        if sent[0]:
            np.testing.assert_array_equal(np.signbit(sent), part < 0)


@given(tensors(100, 1e6), st.integers(0, 100))
def test_ternary_sends_nothing_but_its_scale(x: Floats, key: int) -> None:
    y = Ternary(block=200).decode(Ternary(block=200).encode(x, key=key))
    top = np.abs(x).max(initial=0)
    assert set(np.abs(y).tolist()) <= {0.0, float(top)}
    assert (y * x >= 0).all()
    if x.size:
        assert np.abs(y).max() == top  # the largest is sent with certainty


def test_ternary_clips() -> None:
    x = np.ones(1000, np.float32)
    x[:500] = -1
    x[0] = 100
    sent = Ternary(block=65535, clip=2.5).decode(Ternary(block=65535, clip=2.5).encode(x))
    assert np.abs(sent).max() == pytest.approx(2.5 * x.std(), rel=1e-5)


@given(st.integers(1, 3000), st.floats(0.001, 1), st.integers(0, 2**64 - 1))
def test_random_k_sends_one_of_each_stratum(n: int, ratio: float, key: int) -> None:
    codec = RandomK(ratio)
    places, k = codec.places(n, key), codec.num_sent(n)
    starts = np.arange(k + 1) * n // k
    assert (places >= starts[:-1]).all()
    assert (places < starts[1:]).all()
    x = np.arange(1, n + 1, dtype=np.float32)
    y = codec.decode(codec.encode(x, key=key))
    np.testing.assert_array_equal(np.flatnonzero(y), places)
    np.testing.assert_array_equal(y[places], x[places])
    # The sum of two payloads with one key is the payload of the sum.
    twice = codec.encode(x + x, key=key).data
    np.testing.assert_array_equal(twice[-4 * k :].view("<f4"), 2 * codec.encode(x, key=key).data[-4 * k :].view("<f4"))


def test_random_k_visits_every_element_equally() -> None:
    counts = np.zeros(1000)
    for key in range(2000):
        counts[RandomK(0.1).places(1000, key)] += 1
    assert np.abs(counts - 200).max() < 6 * np.sqrt(200 * 0.9)


def test_threshold_sends_about_what_top_k_sends() -> None:
    x = np.random.default_rng(0).standard_normal(200_000).astype(np.float32)
    for key in range(20):
        y = Threshold(0.01, sample=0.1).decode(Threshold(0.01, sample=0.1).encode(x, key=key))
        count = np.count_nonzero(y)
        assert abs(count - 2000) < 6 * 2000 / np.sqrt(0.01 * 0.1 * x.size)
        assert set(np.flatnonzero(y)) == set(largest(x, int(count)))


@pytest.mark.parametrize("x", [np.zeros(5000), np.ones(5000), np.where(np.arange(5000) == 7, 1, 0)])
def test_threshold_sends_twice_its_aim_at_most_and_something_always(x: npt.NDArray[np.float64]) -> None:
    codec = Threshold(0.01, sample=0.05)
    data = codec.encode(x.astype(np.float32)).data
    start = 18 + len(codec._params())
    assert 1 <= int(data[start : start + 8].view("<u8")[0]) <= 100


@given(codecs(), tensors(20, 3.4028234663852886e38))
def test_the_largest_numbers_stay_finite(codec: Codec, x: Floats) -> None:
    y = codec.decode(codec.encode(x))
    assert np.isfinite(y).all()
    error = y.astype(np.float64) - x
    if isinstance(codec, LowRank):  # what a projection leaves out is shorter, but an element of it may be larger
        assert np.linalg.norm(error) <= (1 + 1e-6) * np.linalg.norm(x.astype(np.float64))
        assert np.isfinite(x - y).all()
    else:
        assert (np.abs(error) <= np.abs(x).max(initial=0)).all()


@given(st.integers(0, 10_000))
@pytest.mark.parametrize(
    ("codec", "largest_value"),
    [
        (Int8(block=20_000, rounding="stochastic"), 127),
        (IntN(4, block=20_000, rounding="stochastic"), 7),
        (IntN(2, block=20_000, rounding="stochastic"), 1),
        (Ternary(block=20_000), 1),
    ],
)
def test_stochastic_rounding_is_unbiased(codec: Codec, largest_value: float, key: int) -> None:
    x = np.full(20_000, 0.3, np.float32)
    x[0] = largest_value  # one level is 1.0
    mean = codec.decode(codec.encode(x, key=key))[1:].mean()
    assert abs(mean - 0.3) < 6 * 0.46 / np.sqrt(20_000)  # six standard errors of a 0.3 coin


@given(tensors(), st.floats(0.001, 1))
def test_top_k_sends_the_largest(x: Floats, ratio: float) -> None:
    codec = TopK(ratio)
    y = codec.decode(codec.encode(x))
    k = codec.num_sent(x.size)
    sent = largest(x, k)
    np.testing.assert_array_equal(y[sent], x[sent])
    rest = np.delete(x, sent)
    assert np.count_nonzero(np.delete(y, sent)) == 0
    if k and rest.size:
        assert np.abs(x[sent]).min() >= np.abs(rest).max()


@given(st.integers(0, 12), st.integers(0, 12), st.integers(1, 4), st.integers(0, 2**64 - 1), st.data())
def test_low_rank_projects(rows: int, cols: int, rank: int, key: int, data: st.DataObject) -> None:
    """Encoding what was decoded gives it again, and what is left has nothing of it."""
    codec = LowRank(rank, rows=rows)
    x = data.draw(hnp.arrays(np.float32, rows * cols, elements=st.floats(-1e4, 1e4, width=32)))
    y = codec.decode(codec.encode(x, key=key))
    if rows and (rows + cols) * min(rank, rows, cols) >= x.size:
        np.testing.assert_array_equal(y, x)
    bound = 1e-5 * (1 + np.linalg.norm(x))
    assert np.linalg.norm(codec.decode(codec.encode(y, key=key)) - y) <= bound
    assert abs(np.dot(y.astype(np.float64), x - y)) <= bound * (1 + np.linalg.norm(x))


@given(st.integers(0, 4000))
def test_low_rank_matrix_of_any_size(n: int) -> None:
    rows, cols = LowRank().matrix_shape(n)
    assert rows * cols == n
    assert rows <= cols
    assert not any(n % d == 0 for d in range(rows + 1, int(n**0.5) + 1))
    assert LowRank(3).effective_rank(n) == min(3, rows)


@settings(max_examples=400)
@given(
    st.tuples(st.integers(0, 9), st.integers(0, 6)),
    st.integers(-140, 126),
    st.sampled_from(["normal", "repeated", "low rank", "zero"]),
    st.integers(0, 2**32),
)
def test_orthonormalize(shape: tuple[int, int], exponent: int, kind: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 1, shape)
    if kind == "repeated" and x.size:
        x[:] = x[:, :1]
    if kind == "low rank" and x.size:
        x = x[:, :1] @ rng.uniform(-1, 1, (1, shape[1]))
    before = np.ldexp(x * (kind != "zero"), exponent).astype(np.float32)
    p, again = before.copy(), before.copy()
    orthonormalize(p)
    orthonormalize(again)
    np.testing.assert_array_equal(p.view(np.uint32), again.view(np.uint32))
    alive = np.arange(shape[1]) < shape[0]
    gram = p.T.astype(np.float64) @ p
    np.testing.assert_allclose(gram, np.diag(alive.astype(np.float64)), atol=1e-6)
    # The columns span what they did.
    left = before.astype(np.float64) - p @ (p.T.astype(np.float64) @ before)
    norms = np.linalg.norm(before.astype(np.float64), axis=0)
    assert (np.linalg.norm(left, axis=0) <= 2e-6 * norms).all()


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_orthonormalize_never_gives_nan(bad: float) -> None:
    p = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32)
    p[2, 1] = bad
    orthonormalize(p)
    np.testing.assert_allclose(p.T @ p, np.eye(3), atol=1e-6)


@settings(max_examples=400)
@given(st.integers(0, 60), codecs(), st.data())
def test_nothing_is_lost(n: int, codec: Codec, data: st.DataObject) -> None:
    """decode(encode(g + r)) + r' == g + r, step after step; stochastic rounding within one ulp."""
    feedback, residual = Feedback(codec), np.zeros(n, np.float32)
    elements = st.floats(-1e4, 1e4, width=32)
    for step in range(3):
        g = data.draw(hnp.arrays(np.float32, n, elements=elements))
        owed = g + residual
        sent = codec.decode(feedback.encode("w", g, key=step))
        feedback.commit()
        residual = feedback.state_dict()["residual/w"]
        if codec in INEXACT:
            assert (np.abs(sent + residual - owed) <= np.spacing(np.maximum(np.abs(sent), np.abs(owed)))).all()
        else:
            np.testing.assert_array_equal(sent + residual, owed)


@given(tensors(60, 1e4), st.floats(0.1, 0.95))
def test_momentum_correction_sends_the_velocity(g: Floats, momentum: float) -> None:
    feedback = Feedback(Identity(), momentum=momentum)
    velocity = np.zeros_like(g)
    for _ in range(3):
        velocity = velocity * np.float32(momentum) + g
        np.testing.assert_allclose(Identity().decode(feedback.encode("w", g)), velocity, rtol=1e-5, atol=1e-3)
        feedback.commit()


@given(tensors(60, 1e4))
def test_a_step_that_does_not_count_leaves_no_trace(g: Floats) -> None:
    feedback = Feedback(TopK(0.1) >> Int8(), momentum=0.9)
    feedback.encode("w", g)
    feedback.commit()
    before = feedback.state_dict()
    feedback.encode("w", g * 2)
    feedback.rollback()
    after = feedback.state_dict()
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)


@settings(max_examples=400)
@given(codecs(), st.data(), st.integers(0, 40), st.integers(0, 2**32))
def test_the_residual_is_the_same_however_it_is_found(codec: Codec, data: st.DataObject, n: int, key: int) -> None:
    elements = st.floats(-1e4, 1e4, width=32)
    g, residual = (data.draw(hnp.arrays(np.float32, n, elements=elements)) for _ in range(2))
    payload, left = codec.encode_with_residual(g, residual, key=key)
    assert payload == codec.encode(g + residual, key=key)
    np.testing.assert_array_equal(left, g + residual - codec.decode(payload))
    out = np.full(n, np.nan, np.float32)
    again, in_place = codec.encode_with_residual(torch.from_numpy(g), None, key=key, out=out)
    assert again == codec.encode(g, key=key)
    assert in_place is out
    np.testing.assert_array_equal(out, g - codec.decode(again))


def test_int8_level_that_is_never_written_is_refused() -> None:
    """-128 times the largest scale overflows."""
    data = bytearray(bytes(Int8().encode(np.full(3, -3e38, np.float32))))
    data[-1] = 0x80
    data[14:18] = struct.pack("<I", zlib.crc32(data[18:], zlib.crc32(data[:14])))
    with pytest.raises(PayloadError, match="Int8 payload holds -128"):
        decode(bytes(data))


@settings(max_examples=400)
@given(codecs(), tensors())
def test_decode_add_adds(codec: Codec, x: Floats) -> None:
    payload = codec.encode(x)
    out = np.ones_like(x)
    codec.decode_add(payload, out, weight=0.5)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(out, np.float32(1) + np.float32(0.5) * codec.decode(payload))
    tensor = torch.ones(x.size)
    codec.decode_add(payload, tensor, weight=0.5)
    np.testing.assert_array_equal(tensor.numpy(), out)


@given(st.data(), st.integers(1, 5000))
def test_indices_come_back(data: st.DataObject, n: int) -> None:
    indices = np.array(sorted(data.draw(st.sets(st.integers(0, n - 1), max_size=200))), np.int64)
    coded = encode_indices(indices, n)
    assert coded.size == index_bytes(indices.size, n)
    np.testing.assert_array_equal(decode_indices(coded, indices.size, n), indices)


def test_indices_cost_what_the_docstring_says() -> None:
    bits = 8 * index_bytes(100_000, 10_000_000) / 100_000
    assert bits <= 2 + np.log2(100)


@pytest.mark.parametrize("codec", CODECS, ids=format_codec)
def test_large_tensor(codec: Codec) -> None:
    x = np.random.default_rng(0).standard_normal(1 << 20).astype(np.float32)
    y = codec.decode(codec.encode(x))
    assert y.shape == x.shape
    assert np.abs(y - x).max() <= np.abs(x).max()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("codec", CODECS, ids=format_codec)
def test_nothing_of_sixteen_million_elements_is_lost(codec: Codec) -> None:
    x = np.random.default_rng(0).standard_normal(1 << 24, np.float32)
    payload, left = codec.encode_with_residual(x, x * np.float32(0.5), key=1)
    owed, sent = x + x * np.float32(0.5), codec.decode(payload)
    error = np.abs(sent + left - owed)
    assert (error <= (np.spacing(np.maximum(np.abs(sent), np.abs(owed))) if codec in INEXACT else 0)).all()


@pytest.mark.parametrize("codec", CODECS, ids=format_codec)
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_non_finite_is_refused_by_name(codec: Codec, bad: float) -> None:
    x = np.ones(10, np.float32)
    x[3] = bad
    with pytest.raises(NonFiniteError, match=r"1 of 10 entries .* index 3"):
        codec.encode(x)
    with pytest.raises(NonFiniteError, match=r"parameter 'layer\.weight'"):
        Feedback(codec).encode("layer.weight", x)


@pytest.mark.parametrize("x", [np.ones((2, 2), np.float32), np.ones(3, np.float64), np.ones(3, np.int32)])
def test_wrong_tensors_are_refused(x: npt.NDArray[np.float32]) -> None:
    with pytest.raises(ValueError, match="codecs take"):
        Identity().encode(x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(dtype: torch.dtype) -> None:
    x = torch.tensor([1.5, -2.25, 0.0], dtype=dtype)
    assert Identity().decode(Identity().encode(x)).tolist() == [1.5, -2.25, 0.0]


def mutate(message: bytes, rng: random.Random) -> bytes:
    """Cut, lengthen, flip or overwrite; half of the time with the checksum made right again."""
    data = bytearray(message)
    for _ in range(rng.randint(1, 4)):
        kind = rng.randrange(4)
        if kind == 0 and data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[rng.randint(0, len(data)) :]
        elif kind == 2:
            data += rng.randbytes(rng.randint(1, 9))
        elif data:
            place = rng.randrange(len(data))
            data[place : place + 4] = rng.choice([b"\0\0\0\0", b"\xff\xff\xff\xff", rng.randbytes(4)])
    if len(data) >= 18 and rng.random() < 0.5:
        crc = zlib.crc32(data[18:], zlib.crc32(data[:14]))
        data[14:18] = struct.pack("<I", crc)
    return bytes(data)


def attack(codec: Codec, num_messages: int) -> int:
    """Feed mutated messages to both doors; returns how many still decoded."""
    rng = random.Random(zlib.crc32(format_codec(codec).encode()))
    x = np.random.default_rng(1).standard_normal(50).astype(np.float32)
    message, decoded = bytes(codec.encode(x)), 0
    for _ in range(num_messages):
        bad = mutate(message, rng)
        out = np.zeros(50, np.float32)
        try:
            codec.decode_add(bad, out)
            assert np.isfinite(out).all()
        except PayloadError:
            assert not out.any()
        try:
            y = decode(bad, max_elements=10_000)
        except PayloadError:
            continue
        decoded += 1
        assert y.dtype == np.float32
        assert np.isfinite(y).all()
    return decoded


ATTACKED = [*CODECS, LowRank(1, rows=5), LowRank(3, rows=10)]


@pytest.mark.parametrize("codec", ATTACKED, ids=format_codec)
def test_mutated_messages_give_a_tensor_or_a_payload_error(codec: Codec) -> None:
    """A hundred thousand of each class, shared by its settings."""
    num = math.ceil(100_000 / sum(type(other) is type(codec) for other in ATTACKED))
    assert attack(codec, num) > 0  # some mutations stay valid, or the attack never got past the checksum


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("codec", CODECS, ids=format_codec)
def test_a_million_mutated_messages(codec: Codec) -> None:
    assert attack(codec, 1_000_000) > 0


@given(st.binary(max_size=200))
@settings(max_examples=500)
def test_any_bytes_at_all(data: bytes) -> None:
    with pytest.raises(PayloadError):
        decode(data)


@settings(max_examples=400)
@given(codecs())
def test_text_and_codec_are_the_same(codec: Codec) -> None:
    assert parse_codec(format_codec(codec)) == codec


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "codec '': invalid syntax. Write it like"),
        ("Int8(", "codec 'Int8(': '(' was never closed. Write it like"),
        ("Toppk()", "codec 'Toppk' is unknown; nearest is 'TopK'. Known: "),
        ("Int8(block=0)", "block"),
        ("__import__('os')", "codec '__import__' is unknown"),
    ],
)
def test_a_text_that_is_no_codec_is_explained(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        parse_codec(text)


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (zlib.compress(bytes(1 << 24), 9, -15), "at most 32 bytes"),  # a bomb: 16 KB that would be 16 MB
        (zlib.compress(bytes(32), 9, -15) + b"\0", "at most 32 bytes"),
        (zlib.compress(bytes(32), 9, -15)[:-1], "at most 32 bytes"),
        (b"\xff", "no DEFLATE stream"),
    ],
)
def test_a_deflated_body_is_one_stream_of_the_right_length(body: bytes, problem: str) -> None:
    codec = Int8(block=4) >> Deflate()
    data = bytearray(bytes(codec.encode(np.zeros(16, np.float32)))[:23] + b"\1" + body)
    data[14:18] = struct.pack("<I", zlib.crc32(data[18:], zlib.crc32(data[:14])))
    with pytest.raises(PayloadError, match=problem):
        decode(bytes(data))


@given(st.data(), st.integers(1, 200), st.integers(1, 4))
def test_a_sparse_sum_is_the_sum_of_whole_tensors(data: st.DataObject, n: int, num: int) -> None:
    """To the bit, and what it moves as well."""
    entries, whole = Entries(n), np.zeros(n, np.float32)
    codec = TopK(0.2) >> Int8(block=4)
    for number in range(num):
        x = data.draw(hnp.arrays(np.float32, n, elements=st.floats(-1e4, 1e4, width=32, allow_subnormal=False)))
        slot = np.zeros(slot_bytes(codec, n), np.uint8)
        fill_slot(slot, codec, codec.encode(x, key=number))
        add_slot(slot, codec, entries, 1 / num)
        add_slot(slot, codec, whole, 1 / num)
    assert (np.diff(entries.places) > 0).all()
    found = np.zeros(n, np.float32)
    found[entries.places] = entries.values
    np.testing.assert_array_equal(found, whole)
    assert entries.square() == pytest.approx(float(np.dot(whole, whole)), rel=1e-5)
    moved = np.ones(n, np.float32)
    entries.add_to(moved, -0.1)
    np.testing.assert_array_equal(moved, np.ones(n, np.float32) + np.float32(-0.1) * whole)
    with pytest.raises(PayloadError, match="checksum"):
        add_slot(slot ^ np.uint8(1), codec, entries, 1.0)

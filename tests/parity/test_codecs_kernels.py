"""The compiled kernels against the NumPy code of the codecs: the same bits for every input."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given

from efftrain.compression import (
    Codec,
    Feedback,
    Fp8,
    Half,
    Int8,
    IntN,
    Mx,
    Sign,
    Ternary,
    Threshold,
    TopK,
    format_codec,
    kernels,
)
from efftrain.compression.entries import Entries
from efftrain.compression.indices import decode_indices, encode_indices, index_bytes
from efftrain.compression.wire import pack, unpack
from efftrain.errors import NonFiniteError, PayloadError

Floats = npt.NDArray[np.float32]

CODECS: list[Codec] = [
    Int8(),
    Int8(block=1),
    Int8(block=7),
    Int8(block=1000),
    IntN(4),
    IntN(4, block=5),
    IntN(4, block=1100),
    IntN(2),
    IntN(2, block=5),
    IntN(2, block=1100),
    Sign(),
    Sign(block=33),
    Sign(block=8),
    Sign(block=1),
    Half("fp16"),
    Half("bf16"),
    Fp8("e4m3"),
    Fp8("e5m2", block=7),
    Mx("e5m2"),
    Mx("e3m2"),
    Mx("e2m1"),
    Mx("int8"),
    Ternary(block=33),
    Ternary(block=256, clip=2.5),
    TopK(0.1) >> Half("fp16"),
    TopK(0.1) >> Ternary(block=20),
    Threshold(0.02, sample=0.02),
    TopK(0.1) >> Sign(block=20),
    TopK(0.001),
    TopK(0.01) >> Int8(block=64),
    TopK(0.2),
    TopK(0.03) >> IntN(4),
    TopK(0.5),
    TopK(1.0) >> Int8(block=9),
]


@contextmanager
def numpy_only() -> Iterator[None]:
    before = os.environ.get("EFFTRAIN_KERNELS")
    os.environ["EFFTRAIN_KERNELS"] = "off"
    try:
        yield
    finally:
        del os.environ["EFFTRAIN_KERNELS"]
        if before is not None:
            os.environ["EFFTRAIN_KERNELS"] = before


@pytest.fixture(autouse=True)
def _compiled() -> None:
    if kernels.available() is None:
        pytest.skip(f"no compiled kernels: {kernels.why_not()}")


def bits(x: Floats) -> npt.NDArray[np.uint32]:
    """So that -0.0 and 0.0 differ."""
    return x.view(np.uint32)


def same_bits(codec: Codec, x: Floats, residual: Floats | None) -> None:
    payload, left = codec.encode_with_residual(x, residual)
    alone, out = codec.encode(x), np.full_like(x, 3)
    decoded = codec.decode(alone)
    codec.decode_add(alone, out, weight=0.3)
    with numpy_only():
        expected_payload, expected_left = codec.encode_with_residual(x, residual)
        expected_alone, expected_out = codec.encode(x), np.full_like(x, 3)
        np.testing.assert_array_equal(bits(decoded), bits(codec.decode(expected_alone)))
        codec.decode_add(expected_alone, expected_out, weight=0.3)
    assert payload == expected_payload
    assert alone == expected_alone
    np.testing.assert_array_equal(bits(left), bits(expected_left))
    np.testing.assert_array_equal(bits(out), bits(expected_out))


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Floats, Floats | None]:
    """A tensor and a residual, with ties, denormals, both zeros and the largest numbers."""
    n = draw(st.integers(0, 300))
    special = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, -1.3e-43, 1.1754944e-38, 3.4028235e38, -3.4028235e38])
    elements = st.one_of(special, st.floats(-1e3, 1e3, width=32), st.floats(-(2.0**125), 2.0**125, width=32))
    x = draw(hnp.arrays(np.float32, n, elements=elements))
    if draw(st.booleans()):
        return x, None
    return np.clip(x, -(2.0**125), 2.0**125).astype(np.float32), draw(
        hnp.arrays(np.float32, n, elements=st.floats(-(2.0**125), 2.0**125, width=32))
    )


@given(st.data(), st.integers(1, 300), st.floats(-2, 2, width=32))
def test_any_sparse_sum(data: st.DataObject, n: int, weight: float) -> None:
    places = st.lists(st.integers(0, n - 1), max_size=n, unique=True).map(sorted)
    found, expected = Entries(n), Entries(n)
    for _ in range(3):
        chosen = np.array(data.draw(places), np.int64)
        values = data.draw(hnp.arrays(np.float32, chosen.size, elements=st.floats(-(2.0**100), 2.0**100, width=32)))
        found.add(chosen, values, weight)
        with numpy_only():
            expected.add(chosen, values, weight)
    np.testing.assert_array_equal(found.places, expected.places)
    np.testing.assert_array_equal(bits(found.values), bits(expected.values))


@given(st.sampled_from(CODECS), pairs())
def test_any_tensor(codec: Codec, pair: tuple[Floats, Floats | None]) -> None:
    same_bits(codec, *pair)


def shapes_of_gradients() -> dict[str, Floats]:
    """Long enough for the sampled threshold, and some that mislead it."""
    rng, n = np.random.default_rng(0), 200_003
    normal = rng.standard_normal(n).astype(np.float32)
    rare = np.zeros(n, np.float32)
    rare[rng.choice(n, 900, replace=False)] = rng.standard_normal(900)
    heavy = (normal * np.exp(3 * rng.standard_normal(n))).astype(np.float32)
    return {
        "normal": normal,
        "heavy tails": heavy,
        "sorted": np.sort(np.abs(normal)),
        "all at the end": np.where(np.arange(n) > n - 3000, np.float32(1e6), np.float32(0)) * normal,
        "all equal": np.full(n, -2.5, np.float32),
        "zero": np.zeros(n, np.float32),
        "mostly zero": rare,
        "denormal": normal * np.float32(1e-41),
        "few levels": np.round(normal * 2),
    }


@pytest.mark.parametrize("shape", shapes_of_gradients())
@pytest.mark.parametrize("codec", CODECS, ids=format_codec)
def test_long_tensors(codec: Codec, shape: str) -> None:
    x = shapes_of_gradients()[shape].astype(np.float32)
    if not isinstance(codec, TopK):  # nothing is sampled
        x = x[-20_003:].copy()
    same_bits(codec, x, None)
    same_bits(codec, x, np.roll(x, 1000) * np.float32(0.7))


@pytest.mark.parametrize("codec", CODECS, ids=format_codec)
@pytest.mark.parametrize("n", [40, 100_000])
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_inf_and_nan_are_found_in_sum_and_terms(codec: Codec, n: int, bad: float) -> None:
    x = np.random.default_rng(1).standard_normal(n).astype(np.float32)
    for place in (0, n // 3, n - 1):
        y = x.copy()
        y[place] = bad
        with pytest.raises(NonFiniteError, match=f"1 of {n} entries .* index {place};"):
            codec.encode(y)
        with pytest.raises(NonFiniteError, match=f"1 of {n} entries .* index {place};"):
            codec.encode_with_residual(y, x)
    huge = np.full(n, 3e38, np.float32)
    feedback = Feedback(codec)
    feedback.load_state_dict({"residual/w": huge})
    with pytest.raises(NonFiniteError, match="parameter 'w' plus what earlier steps left unsent"):
        feedback.encode("w", huge)


@given(st.data(), st.integers(1, 5000))
def test_index_codes(data: st.DataObject, n: int) -> None:
    places = np.array(sorted(data.draw(st.sets(st.integers(0, n - 1), max_size=300))), np.int64)
    coded = encode_indices(places, n)
    with numpy_only():
        np.testing.assert_array_equal(coded, encode_indices(places, n))
        np.testing.assert_array_equal(places, decode_indices(coded, places.size, n))
    np.testing.assert_array_equal(places, decode_indices(coded, places.size, n))


@given(st.data(), st.integers(2, 3000))
def test_any_index_bits(data: st.DataObject, n: int) -> None:
    """Both ways accept the same bytes and refuse the same bytes."""
    k = data.draw(st.integers(1, n - 1))
    size = index_bytes(k, n)
    if data.draw(st.booleans()):
        coded = np.frombuffer(data.draw(st.binary(min_size=size, max_size=size)), np.uint8)
    else:
        rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
        coded = encode_indices(np.sort(rng.choice(n, k, replace=False)), n)
        coded[rng.integers(size)] ^= 1 << rng.integers(8)
    results = []
    for context in (numpy_only(), None):
        try:
            if context is None:
                results.append(decode_indices(coded, k, n).tolist())
            else:
                with context:
                    results.append(decode_indices(coded, k, n).tolist())
        except PayloadError:
            results.append(None)
    assert results[0] == results[1]


@given(st.integers(0, 70), st.sampled_from([1, 2, 4, 6]), st.data())
def test_packed_codes(n: int, num_bits: int, data: st.DataObject) -> None:
    codes = data.draw(hnp.arrays(np.uint8, n, elements=st.integers(0, (1 << num_bits) - 1)))
    packed = kernels.pack_codes(codes, num_bits)
    assert packed is not kernels.MISSING
    as_bits = np.unpackbits(codes[:, None], axis=1, bitorder="little")[:, :num_bits]
    np.testing.assert_array_equal(packed, np.packbits(as_bits.reshape(-1), bitorder="little"))
    back = kernels.unpack_codes(packed, n, num_bits)
    assert back is not kernels.MISSING
    np.testing.assert_array_equal(back, codes)


@pytest.mark.parametrize("codec", [IntN(4, block=3), IntN(2, block=3)], ids=format_codec)
def test_any_levels(codec: IntN) -> None:
    """Both ways accept the same bytes and refuse the same bytes."""
    split, payload = 4 * 2, unpack(codec.encode(np.arange(4, dtype=np.float32)))
    for byte in range(256):
        body = payload.body.copy()
        body[split] = byte
        message, results = pack(payload.codec_id, payload.params, 4, [body]), []
        for context in (numpy_only(), nullcontext()):
            with context:
                try:
                    results.append(bits(codec.decode(message)).tolist())
                except PayloadError as error:
                    results.append(str(error))
        assert results[0] == results[1]
        codes = [byte >> shift & ((1 << codec.bits) - 1) for shift in range(0, 8, codec.bits)]
        assert isinstance(results[0], str) == (1 << (codec.bits - 1) in codes)


def gcc_file(name: str) -> str | None:
    gcc = shutil.which("gcc")
    if gcc is None:
        return None
    path = subprocess.run([gcc, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
    return path if Path(path).is_absolute() else None


@given(pairs(), st.floats(-1e6, 1e6))
def test_any_sum_in_double(pair: tuple[Floats, Floats | None], weight: float) -> None:
    a, b = pair
    total = np.zeros(a.size) if b is None else b.astype(np.float64) / 3
    expected = total + np.multiply(a, weight, dtype=np.float64)
    assert kernels.add_in_double(a, weight, total) is None
    np.testing.assert_array_equal(total.view(np.uint64), expected.view(np.uint64))


def run_again(
    tmp_path: Path, setup: str, tests: str = "(any or long or index) and not built", **environment: str
) -> None:
    """Tests of this file in a process of their own, with kernels built in another way."""
    script = f"{setup}\nimport sys, pytest\nsys.exit(pytest.main([{__file__!r}, '-q', '-k', {tests!r}]))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "EFFTRAIN_CACHE": str(tmp_path), "EFFTRAIN_NO_SKIPS": "1", **environment},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_under_sanitizers(tmp_path: Path) -> None:
    library = gcc_file("libasan.so")
    if library is None:
        pytest.skip("no gcc with the address sanitizer")
    run_again(
        tmp_path,
        "from efftrain.compression.kernels import build\n"
        "build.FLAGS += ('-O1', '-g', '-fsanitize=address,undefined', '-fno-sanitize-recover=all')",
        LD_PRELOAD=library,
        ASAN_OPTIONS="detect_leaks=0",
    )


@pytest.mark.slow
def test_built_by_zig(tmp_path: Path) -> None:
    pytest.importorskip("ziglang")
    run_again(
        tmp_path,
        "import sys\nfrom efftrain.compression.kernels import build\n"
        "build.compilers = lambda: [(sys.executable, '-m', 'ziglang', 'cc')]",
    )


def test_built_for_any_cpu(tmp_path: Path) -> None:
    """Without what only some CPUs can do, and the code written for those."""
    if not kernels.available():
        pytest.skip("no kernels on this machine")
    setup = "from efftrain.compression.kernels import build\nbuild._for_this_cpu = lambda: ()"
    run_again(tmp_path, setup, "index or long and TopK")

"""Small floats against torch's own types, MX against its definition, random places against known SplitMix64 numbers."""

import numpy as np
import numpy.typing as npt
import pytest
import torch

from efftrain.compression import Fp8, Half, Mx
from efftrain.compression.floats import _MINIFLOATS, HalfFormat, MxFormat
from efftrain.compression.sparsify import one_of_each_stratum

Floats = npt.NDArray[np.float32]


def every_size() -> Floats:
    """Numbers of all sizes, and the middles between neighbors in each format, where half to even decides."""
    rng = np.random.default_rng(0)
    random = rng.standard_normal(20_000) * np.exp2(rng.integers(-30, 20, 20_000))
    grids = []
    for small in _MINIFLOATS.values():
        grid = np.unique(small.values()[np.isfinite(small.values())]).astype(np.float64)
        grids += [grid, (grid[1:] + grid[:-1]) / 2]
    both = np.concatenate([random, *grids]).astype(np.float32)
    return np.concatenate([both, -both])


@pytest.mark.parametrize(("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_half_is_torchs(name: HalfFormat, dtype: torch.dtype) -> None:
    x = every_size()
    x = x[np.abs(x) <= 65504]
    x = np.concatenate([x, x * np.float32(1e-5), x * np.float32(1e-8)])
    expected = torch.from_numpy(x).to(dtype)
    data = Half(name).encode(x).data
    np.testing.assert_array_equal(data[-2 * x.size :].view("<u2"), expected.view(torch.uint16).numpy())
    np.testing.assert_array_equal(Half(name).decode(data), expected.float().numpy())


@pytest.mark.parametrize(("name", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_fp8_codes_are_torchs(name: str, dtype: torch.dtype) -> None:
    small, x = _MINIFLOATS[name], every_size()
    x = x[np.abs(x) <= small.largest]  # beyond it torch has NaN or infinity, and we the largest number
    expected = torch.from_numpy(x).to(dtype)
    np.testing.assert_array_equal(small.codes(x), expected.view(torch.uint8).numpy())
    codes = torch.arange(256, dtype=torch.uint8)
    values = codes.view(dtype).float().numpy()
    np.testing.assert_array_equal(small.values(), np.where(np.isfinite(values), values, np.nan))


def test_fp8_block_of_powers_of_two_is_exact() -> None:
    x = (2.0 ** np.arange(-8, 8)).astype(np.float32) * np.float32(448 / 256)
    np.testing.assert_array_equal(Fp8("e4m3").decode(Fp8("e4m3").encode(x)), x)


@pytest.mark.parametrize("name", ["e4m3", "e5m2", "e3m2", "e2m3", "e2m1", "int8"])
def test_mx_follows_its_definition(name: MxFormat) -> None:
    """Block by block in float64, as the specification has it: shared exponent, nearest number, even on ties."""
    rng = np.random.default_rng(1)
    x = (rng.standard_normal(32 * 40) * np.exp2(rng.integers(-140, 127, 40).repeat(32))).astype(np.float32)
    x[:32] = 0
    x[32:64] = np.linspace(-8, 8, 32)
    x[64:96] = np.arange(32) / 4
    y = Mx(name).decode(Mx(name).encode(x[:-5]))
    if name == "int8":
        grid, emax = np.arange(-127, 128) / 64, 0
    else:
        values = _MINIFLOATS[name].values()
        grid = np.unique(values[np.isfinite(values)]).astype(np.float64)
        emax = int(np.floor(np.log2(grid.max())))
    for start in range(0, x.size - 5, 32):
        block, sent = x[start : start + 32][: x.size - 5 - start].astype(np.float64), y[start : start + 32]
        top = np.abs(block).max()
        scale = 2.0 ** max(-127, np.floor(np.log2(top)) - emax) if top else 1.0
        distance = np.abs(grid[:, None] - block / scale)
        near = distance.min(axis=0)
        np.testing.assert_allclose(np.abs(sent / scale - block / scale), near, atol=1e-12)
        ties = (distance == near).sum(axis=0) == 2
        # The even one of two neighbors has an even code: an even rank among the magnitudes.
        magnitudes = np.unique(np.abs(grid))
        ranks = np.searchsorted(magnitudes, np.abs(sent[ties]) / scale)
        assert not (ranks % 2).any()


def test_places_come_from_split_mix() -> None:
    """The first two outputs of SplitMix64 from the seed 1234567, as its authors' C code gives them."""
    first = 6457827717110365317
    n = 1 << 31
    assert one_of_each_stratum(n, 1, 1234567).tolist() == [(first >> 32) * n >> 32]
    second = 3203168211198807973
    assert one_of_each_stratum(n, 2, 1234567).tolist()[1] == n // 2 + ((second >> 32) * (n // 2) >> 32)

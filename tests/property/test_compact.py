"""Slots: payloads without their header."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from efftrain.compression import Codec, parse_codec
from efftrain.compression.compact import add_slot, fill_slot, slot_bytes
from efftrain.errors import PayloadError

CODECS = [
    parse_codec(text)
    for text in (
        "Int8(block=16)",
        "IntN(4)",
        "Half()",
        "Sign()",
        "TopK(0.1)",
        "TopK(0.1) >> Int8(block=8)",
        "RandomK(0.2)",
        "Threshold(0.1)",
        "LowRank(1)",
    )
]


def slot_of(codec: Codec, x: np.ndarray, key: int = 0) -> np.ndarray:
    slot = np.full(slot_bytes(codec, x.size), 255, np.uint8)
    fill_slot(slot, codec, codec.encode(x, key=key))
    return slot


@given(st.sampled_from(CODECS), st.integers(1, 300), st.integers(0, 1 << 30))
def test_a_slot_says_what_the_payload_says(codec: Codec, n: int, seed: int) -> None:
    x = np.random.default_rng(seed).normal(size=n).astype(np.float32)
    expected = np.ones(n, np.float32)
    codec.decode_add(codec.encode(x, key=seed), expected, weight=0.5)
    found = np.ones(n, np.float32)
    add_slot(slot_of(codec, x, seed), codec, found, 0.5)
    np.testing.assert_array_equal(found, expected)


@given(st.sampled_from(CODECS), st.integers(1, 300))
def test_a_slot_is_smaller_than_the_payload(codec: Codec, n: int) -> None:
    x = np.ones(n, np.float32)
    saved = codec.encode(x).num_bytes - slot_bytes(codec, n)
    assert saved == 14 + codec.num_param_bytes or not codec.fixed_size


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_changed_bytes_are_refused(codec: Codec) -> None:
    """Every byte counts, but for the zeros behind a payload of varying size."""
    x = np.random.default_rng(0).normal(size=200).astype(np.float32)
    good, rng = slot_of(codec, x), random.Random(0)
    refused = 0
    for _ in range(3000):
        bad = good.copy()
        bad[rng.randrange(bad.size)] ^= 1 << rng.randrange(8)
        out = np.zeros(200, np.float32)
        try:
            add_slot(bad, codec, out)
        except PayloadError:
            refused += 1
    assert refused == 3000 or (not codec.fixed_size and refused > 1000)


def test_another_codec_or_size_is_refused() -> None:
    x = np.ones(64, np.float32)
    slot = slot_of(parse_codec("Int8(block=16)"), x)
    with pytest.raises(PayloadError, match="slot has 84 bytes, expected 76"):
        add_slot(slot, parse_codec("Int8(block=20, rounding='stochastic')"), np.zeros(60, np.float32))
    with pytest.raises(PayloadError, match="checksum"):
        add_slot(slot, parse_codec("Int8(block=16, rounding='stochastic')"), np.zeros(64, np.float32))

"""Fused passes over large tensors on the CPU, in C. Every one has a NumPy twin that gives the same bits.

The library is compiled on first use by the system's compiler or ``python -m ziglang cc`` and kept in the user's cache.
Without a compiler, without a cache folder to write to, or with ``EFFTRAIN_KERNELS=off`` the NumPy code runs: slower,
nothing else.
"""

from efftrain.compression.kernels.build import available, why_not
from efftrain.compression.kernels.calls import (
    MISSING,
    MinifloatFormat,
    Missing,
    at_least,
    decode_places,
    dequantize,
    dequantize_add,
    encode_minifloats,
    encode_places,
    half_decode,
    half_decode_add,
    half_encode,
    look_up,
    pack_3,
    pack_codes,
    quantize,
    scatter_add,
    sign_decode,
    sign_decode_add,
    sign_encode,
    ternary,
    top_k,
    unpack_3,
    unpack_codes,
)

__all__ = [
    "MISSING",
    "MinifloatFormat",
    "Missing",
    "at_least",
    "available",
    "decode_places",
    "dequantize",
    "dequantize_add",
    "encode_minifloats",
    "encode_places",
    "half_decode",
    "half_decode_add",
    "half_encode",
    "look_up",
    "pack_3",
    "pack_codes",
    "quantize",
    "scatter_add",
    "sign_decode",
    "sign_decode_add",
    "sign_encode",
    "ternary",
    "top_k",
    "unpack_3",
    "unpack_codes",
    "why_not",
]

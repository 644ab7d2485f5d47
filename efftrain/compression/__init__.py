"""Codecs that turn tensors into bytes for every wire. Knows no transport, and decodes without torch.

>>> import numpy as np
>>> from efftrain.compression import Int8, TopK
>>> codec = TopK(0.25) >> Int8()
>>> payload = codec.encode(np.array([0.0, 4.0, 0.1, -0.2], np.float32))
>>> codec.decode(payload).tolist()
[0.0, 4.0, 0.0, 0.0]
"""

from efftrain.compression.codec import Codec
from efftrain.compression.deflate import Deflate
from efftrain.compression.feedback import Feedback, redistribute
from efftrain.compression.floats import Fp8, Half, Mx
from efftrain.compression.lowrank import LowRank, orthonormalize, start_factor
from efftrain.compression.quantize import Identity, Int8, IntN
from efftrain.compression.signs import Sign, Ternary
from efftrain.compression.sparsify import RandomK, Threshold, TopK
from efftrain.compression.spec import codec_of, decode, format_codec, parse_codec
from efftrain.compression.wire import Payload

__all__ = [
    "Codec",
    "Deflate",
    "Feedback",
    "Fp8",
    "Half",
    "Identity",
    "Int8",
    "IntN",
    "LowRank",
    "Mx",
    "Payload",
    "RandomK",
    "Sign",
    "Ternary",
    "Threshold",
    "TopK",
    "codec_of",
    "decode",
    "format_codec",
    "orthonormalize",
    "parse_codec",
    "redistribute",
    "start_factor",
]

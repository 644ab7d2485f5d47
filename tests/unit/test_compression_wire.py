"""The examples of docs/formats/wire.md, byte by byte, and that no codec is missing from the documents."""

import re
from pathlib import Path

import numpy as np
import pytest

from efftrain.compression import parse_codec
from efftrain.compression.spec import CODECS

DOCS = Path(__file__).parents[2] / "docs"
WIRE = (DOCS / "formats" / "wire.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```wire\n(.*?)^```", WIRE, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda text: text.splitlines()[0])
def test_example(example: str) -> None:
    lines = example.splitlines()
    told = dict(line.split(": ", 1) for line in lines if "|" not in line)
    message = bytes.fromhex("".join(line.split("|")[0] for line in lines if "|" in line))
    codec = parse_codec(told["codec"])
    tensor, decoded = (np.array(told[name].split(), np.float32) for name in ("tensor", "decoded"))
    assert bytes(codec.encode(tensor, key=int(told["key"]))).hex(" ") == message.hex(" ")
    np.testing.assert_array_equal(codec.decode(message), decoded)


def test_every_codec_is_documented() -> None:
    shown = {type(parse_codec(example.splitlines()[0].removeprefix("codec: "))) for example in EXAMPLES}
    assert shown == set(CODECS)
    table = (DOCS / "codecs.md").read_text(encoding="utf-8")
    for codec in CODECS:
        assert f"\n## {codec.codec_id} {codec.__name__}\n" in WIRE
        assert f"| `{codec.__name__}(" in table


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("Identity", 4),
        ("Half", 2),
        ("Int8(256)", 1 + 4 / 256),
        ("Fp8", 1 + 4 / 256),
        ("Mx('int8')", 1 + 1 / 32),
        ("Mx('e3m2')", 3 / 4 + 1 / 32),
        ("Mx('e2m1')", 1 / 2 + 1 / 32),
        ("IntN(4)", 1 / 2 + 4 / 128),
        ("IntN(2)", 1 / 4 + 4 / 128),
        ("Ternary", 1 / 5 + 4 / 256),
        ("Sign", 1 / 8 + 4 / 256),
        ("TopK(0.01)", 0.01 * (4 + 1.07)),
        ("TopK(0.01) >> Int8(64)", 0.01 * (1 + 4 / 64 + 1.07)),
        ("RandomK(0.01)", 0.04),
    ],
)
def test_bytes_an_element_are_as_documented(text: str, num_bytes: float) -> None:
    n = 1 << 22
    assert parse_codec(text).encoded_bytes(n) / n == pytest.approx(num_bytes, rel=0.01)

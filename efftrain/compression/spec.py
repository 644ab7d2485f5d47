"""Codecs as text and from bytes: the one list of all codecs.

Recipes name a codec by the expression that makes it in Python, ``"TopK(0.01) >> Int8(block=256)"``. The text is parsed,
never evaluated: calls of known codecs with literal arguments, joined by ``>>``.
"""

import ast
import dataclasses
import difflib
from typing import Any

from efftrain.compression.codec import Codec
from efftrain.compression.deflate import INSIDE, Deflate
from efftrain.compression.quantize import Identity
from efftrain.compression.sparsify import Sparse
from efftrain.compression.wire import MAX_ELEMENTS, Floats, unpack
from efftrain.errors import ConfigError, PayloadError

CODECS: tuple[type[Codec], ...] = (*INSIDE, Deflate)

_BY_NAME = {codec.__name__: codec for codec in CODECS}
_BY_ID = {codec.codec_id: codec for codec in CODECS}


def parse_codec(text: str) -> Codec:
    """Make a codec from its text, e.g. ``"Int8(block=64)"`` or ``"TopK(0.01) >> Int8"``.

    Raises:
        ConfigError: Not such an expression, an unknown codec (the nearest is named), or a value out of range.
    """
    try:
        return _build(ast.parse(text.strip(), mode="eval").body, text)
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = error.msg if isinstance(error, SyntaxError) else error
        raise ConfigError(f"codec {text!r}: {reason}. Write it like 'TopK(0.01) >> Int8(block=256)'.") from error


def format_codec(codec: Codec) -> str:
    """Text that ``parse_codec`` turns into an equal codec; knobs at their default are left out."""
    knobs = {f: getattr(codec, f.name) for f in dataclasses.fields(codec)}
    inner = [value for value in knobs.values() if isinstance(value, Codec)]
    told = [f"{f.name}={v!r}" for f, v in knobs.items() if not isinstance(v, Codec) and v != f.default]
    text = f"{type(codec).__name__}({', '.join(told)})"
    if isinstance(codec, Deflate):
        return f"{format_codec(codec.codec)} >> {text}"
    return " >> ".join([text, *(format_codec(c) for c in inner if c != Identity())])


def codec_of(message: Any) -> Codec:
    """The codec that wrote a message, read from its header.

    Raises:
        PayloadError: The bytes are no payload or name an unknown codec.
    """
    parts = unpack(message)
    if parts.codec_id not in _BY_ID:
        raise PayloadError(f"payload names codec {parts.codec_id}, this efftrain knows {sorted(_BY_ID)}")
    return _BY_ID[parts.codec_id]._from_params(parts.params)


def decode(message: Any, *, max_elements: int = MAX_ELEMENTS) -> Floats:
    """Decode a message of any codec. Where the expected codec is known, its own ``decode`` is the safer door.

    Returns:
        Shape ``(N,)``, float32.

    Raises:
        PayloadError: For any bytes that are not a valid payload.
    """
    return codec_of(message).decode(message, max_elements=max_elements)


def _build(node: ast.expr, text: str) -> Codec:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.RShift):
        first, then = _build(node.left, text), _build(node.right, text)
        if isinstance(then, Deflate):
            return then.__rrshift__(first)
        if not isinstance(first, Sparse):
            raise ConfigError(
                f"codec {text!r}: {type(first).__name__} sends its values itself, only Deflate can follow it. "
                "A sparse codec such as TopK can be followed by the codec of its values."
            )
        return first >> then
    call = node if isinstance(node, ast.Call) else ast.Call(func=node, args=[], keywords=[])
    if not isinstance(call.func, ast.Name):
        raise ConfigError(f"codec {text!r} is not a codec expression. Write it like 'TopK(0.01) >> Int8(block=256)'.")
    if call.func.id not in _BY_NAME:
        near = difflib.get_close_matches(call.func.id, _BY_NAME, n=1, cutoff=0)[0]
        raise ConfigError(f"codec {call.func.id!r} is unknown; nearest is {near!r}. Known: {', '.join(_BY_NAME)}.")
    try:
        args = [_literal(arg, text) for arg in call.args]
        kwargs = {str(k.arg): _literal(k.value, text) for k in call.keywords}
        if len(kwargs) < len(call.keywords):
            raise ValueError("an argument is given twice")
        return _BY_NAME[call.func.id](*args, **kwargs)
    except (TypeError, ValueError) as error:
        raise error if isinstance(error, ConfigError) else ConfigError(f"codec {text!r}: {error}") from error


def _literal(node: ast.expr, text: str) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError as error:
        raise ConfigError(
            f"codec {text!r}: {ast.unparse(node)} is no number and no text in quotes. The codec of the values sent "
            "follows after >>, as in 'TopK(0.01) >> Int8(block=256)'."
        ) from error

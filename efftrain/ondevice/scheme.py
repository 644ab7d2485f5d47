"""Which parameters learn on the device.

A scheme is written for no model in particular: layers may be counted from the end, so one preset fits any chain of
convolutions with a classifier at the end. What it costs is the plan's business: trained weights need RAM, and the
lowest trained layer decides how far back gradients are computed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from efftrain.config.load import load_recipe
from efftrain.errors import ConfigError

EVERY_LAYER = "*"


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerShare:
    """Train the weights of one layer for the first ``share`` of its input channels."""

    layer: str
    """A module's name such as ``features.4``, ``-1`` for the last convolution before the head, ``-2`` for the one
    before it, or ``*`` for every convolution."""

    share: float = 1.0
    """In (0, 1]; at least one channel is trained."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share is {self.share}; it must be in (0, 1]")


@dataclass(frozen=True, kw_only=True, slots=True)
class Scheme:
    """An update scheme. The default trains nothing: the program can only predict."""

    name: str
    head: bool = False
    """Train weights and bias of the last layer."""

    last_biases: int = 0
    """Train the biases of the last so many convolutions before the head; -1 for all of them and the head's."""

    weights: tuple[LayerShare, ...] = ()

    def __post_init__(self) -> None:
        if self.last_biases < -1:
            raise ValueError(f"last_biases is {self.last_biases}; it must be -1 (all) or the number of layers")

    @classmethod
    def preset(cls, name: str) -> "Scheme":
        """``none``, ``bias_only``, ``last_layer``, ``sparse`` or ``full``.

        Raises:
            ConfigError: There is no such preset.
        """
        if name not in PRESETS:
            raise ConfigError(f"scheme {name!r} is not known; presets are {', '.join(PRESETS)}, or give a TOML file")
        return PRESETS[name]

    @classmethod
    def load(cls, path: Path | str) -> "Scheme":
        """Read a scheme from a TOML file; unknown keys are errors.

        Raises:
            ConfigError: The file is missing, no TOML, or has an unknown key or a value out of range.
        """
        return load_recipe(cls, path, what="scheme file")


PRESETS = {
    scheme.name: scheme
    for scheme in (
        Scheme(name="none"),
        Scheme(name="bias_only", last_biases=-1),
        Scheme(name="last_layer", head=True),
        # Source: the shape of the schemes in Lin et al., On-Device Training Under 256KB Memory (arXiv:2206.15472): the
        # head, some biases, and a share of the input channels of few layers.
        Scheme(name="sparse", head=True, last_biases=2, weights=(LayerShare(layer="-1", share=0.5),)),
        Scheme(name="full", head=True, last_biases=-1, weights=(LayerShare(layer=EVERY_LAYER),)),
    )
}


@dataclass(frozen=True, slots=True)
class Layer:
    """What ``resolve`` must know of a layer."""

    name: str
    in_channels: int
    has_bias: bool


@dataclass(frozen=True, slots=True)
class Trained:
    """What is trained of one layer."""

    channels: int = 0
    """Input channels [0, channels)."""

    bias: bool = False


def resolve(scheme: Scheme, layers: Sequence[Layer]) -> dict[str, Trained]:
    """Apply a scheme to the layers of a model, in forward order, the head last.

    Raises:
        ConfigError: The scheme names a layer that the model does not have, or one twice.
    """
    convs, head = layers[:-1], layers[-1]
    channels: dict[str, int] = {head.name: head.in_channels} if scheme.head else {}
    named: set[str] = set()
    for entry in scheme.weights:
        for layer in _matches(entry.layer, convs, head, scheme.name):
            if layer.name in named:
                raise ConfigError(f"scheme {scheme.name!r} names layer {layer.name!r} twice")
            named.add(layer.name)
            channels[layer.name] = max(1, round(entry.share * layer.in_channels))
    count = len(convs) if scheme.last_biases == -1 else scheme.last_biases
    if count > len(convs):
        raise ConfigError(
            f"scheme {scheme.name!r} trains the biases of {count} convolutions, the model has {len(convs)}. Use "
            f"-1 for all."
        )
    biases = {layer.name for layer in convs[len(convs) - count :]}
    if scheme.head or scheme.last_biases == -1:
        biases.add(head.name)
    return {
        layer.name: Trained(channels.get(layer.name, 0), layer.has_bias and layer.name in biases) for layer in layers
    }


def _matches(pattern: str, convs: Sequence[Layer], head: Layer, scheme: str) -> Sequence[Layer]:
    if pattern == EVERY_LAYER:
        return convs
    for layer in (*convs, head):
        if layer.name == pattern:
            return [layer]
    if pattern.startswith("-") and pattern[1:].isdigit() and 1 <= int(pattern[1:]) <= len(convs):
        return [convs[-int(pattern[1:])]]
    names = ", ".join(repr(layer.name) for layer in (*convs, head))
    if not convs and pattern.startswith("-"):
        remedy = "It needs a hidden convolution; use last_layer or full."
    else:
        remedy = "Use one of them, or count convolutions from -1."
    raise ConfigError(f"scheme {scheme!r} names layer {pattern!r}; the model has {names}. {remedy}")

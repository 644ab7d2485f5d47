"""Which parameters learn on the device.

A scheme is written for no model in particular: layers may be counted from the end, so one preset fits any network of
convolutions with a classifier at the end. Schemes that were found for one model count from the input. What it costs is
the plan's business: trained weights need RAM, and the lowest trained layer decides how far back gradients are computed.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from efftrain.config.load import load_recipe
from efftrain.errors import ConfigError

EVERY_LAYER = "*"
_MOST_NAMES = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerShare:
    """Train the weights of one layer for a ``share`` of its input or output channels.

    A depthwise convolution has one channel in for each channel out: its share counts them. Of a convolution in groups
    it is that of the channels of each group; a group of one channel has none.
    """

    layer: str
    """A module's name such as ``features.4``; ``#4`` for the fifth layer with weights from the input, the head
    included; ``-1`` for the last convolution before the head, ``-2`` for the one before it; or ``*`` for every
    convolution."""

    share: float = 1.0
    """In (0, 1]. Rounded to whole channels; at least one is trained."""

    of: Literal["inputs", "outputs"] = "inputs"
    """``inputs`` keeps only that share of what the layer read for the backward pass. ``outputs`` keeps all of it, and
    needs the gradient of that share of the outputs alone where no layer before it learns; the compiler makes two layers
    of it, one that learns and one that does not."""

    choose: Literal["first", "largest"] = "first"
    """Which of the channels: the first ones, or those whose weights have the largest norm. For ``largest`` the compiler
    orders the channels, those that layers behind an addition read for all of them together."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share is {self.share}; it must be in (0, 1]")
        if self.of not in ("inputs", "outputs"):
            raise ValueError(f"of is {self.of!r}; it must be inputs or outputs")
        if self.choose not in ("first", "largest"):
            raise ValueError(f"choose is {self.choose!r}; it must be first or largest")


@dataclass(frozen=True, kw_only=True, slots=True)
class Scheme:
    """An update scheme. The default trains nothing: the program can only predict."""

    name: str
    head: bool = False
    """Train weights and bias of the last layer."""

    last_biases: int = 0
    """Train the biases of the last so many convolutions before the head; -1 for all of them and the head's."""

    last_k: int = 0
    """Train weights and biases of the last so many layers; the head is the first of them."""

    weights: tuple[LayerShare, ...] = ()

    any_model: bool = False
    """Written for models of any depth: what is counted back from the head and a small model lacks is left out."""

    def __post_init__(self) -> None:
        if self.last_biases < -1:
            raise ValueError(f"last_biases is {self.last_biases}; it must be -1 (all) or the number of layers")
        if self.last_k < 0:
            raise ValueError(f"last_k is {self.last_k}; it must be the number of layers, 0 or more")

    @classmethod
    def preset(cls, name: str) -> "Scheme":
        """One of ``PRESETS``, which fit any model, or of ``PUBLISHED``, each for the model that it was found for.

        Raises:
            ConfigError: There is no such preset.
        """
        known = {**PRESETS, **PUBLISHED}
        if name not in known:
            near = difflib.get_close_matches(name, [*known, "last_k=1"], n=1, cutoff=0.7)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"scheme {name!r} is not known; presets are {', '.join(known)}, or write last_k=K, or give a TOML file."
                f"{hint}"
            )
        return known[name]

    @classmethod
    def parse(cls, text: str) -> "Scheme":
        """A scheme as a command line names it: a preset, ``last_k=3``, or a TOML file.

        Raises:
            ConfigError: There is no such preset or file, or it holds a value out of range.
        """
        if text.endswith(".toml"):
            return cls.load(text)
        key, equals, value = text.partition("=")
        if key != "last_k" or not equals:
            return cls.preset(text)
        if not (value.isascii() and value.isdigit() and int(value[:9]) > 0 and len(value) < 9):
            raise ConfigError(f"scheme {text!r}: last_k must be the number of layers to train, 1 or more")
        return cls(name=text, last_k=int(value))

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
        Scheme(name="sparse", head=True, last_biases=2, weights=(LayerShare(layer="-1", share=0.5),), any_model=True),
        Scheme(name="full", head=True, last_biases=-1, weights=(LayerShare(layer=EVERY_LAYER),)),
    )
}


def _published(name: str, num_biases: int, shares: Mapping[int, float]) -> Scheme:
    """A scheme that ships with the reference system: biases of the last convolutions, and layers by position."""
    weights = tuple(LayerShare(layer=f"#{index}", share=share) for index, share in shares.items())
    return Scheme(name=name, head=True, last_biases=num_biases, weights=weights)


PUBLISHED = {
    scheme.name: scheme
    for scheme in (
        # For mcunet-5fps, named by the memory that their authors count for them, found by their search over what each
        # layer contributes. Source: Lin et al., On-Device Training Under 256KB Memory (arXiv:2206.15472), as shipped
        # with tinyengine.
        _published("mcunetv3-49kb", 20, {24: 0.25, 27: 0.5, 30: 0.5}),
        _published("mcunetv3-74kb", 21, {21: 1, 24: 1, 27: 0.5, 30: 1}),
        _published("mcunetv3-99kb", 22, {21: 1, 24: 1, 27: 1, 30: 1, 36: 0.125, 39: 0.25}),
        _published("mcunetv3-124kb", 24, {21: 0.25, 24: 1, 27: 1, 30: 1, 33: 0.5, 39: 0.5}),
        _published("mcunetv3-148kb", 23, {21: 1, 24: 1, 27: 1, 30: 1, 36: 1, 39: 0.5}),
    )
}


@dataclass(frozen=True, slots=True)
class Layer:
    """What ``resolve`` must know of a layer."""

    name: str
    in_channels: int
    """That an output sees; of a depthwise convolution, its channels."""
    out_channels: int
    has_bias: bool
    groups: int = 1
    """Of a convolution in groups; 1 if it is dense or depthwise."""
    depthwise: bool = False


@dataclass(frozen=True, slots=True)
class Trained:
    """What is trained of one layer."""

    channels: int = 0
    """Input channels [0, channels), in the order of the compiled graph. See ``choose.largest_first``."""

    bias: bool = False
    outputs: int = 0
    """Of the weights, those of output channels [0, outputs) alone; 0 for all of them. See ``choose.part_outputs``."""


def resolve(scheme: Scheme, layers: Sequence[Layer]) -> dict[str, Trained]:
    """Apply a scheme to the layers of a model, in forward order, the head last.

    Raises:
        ConfigError: The scheme names a layer that the model does not have, or one twice, or a share of one channel, or
            of the outputs of the head or of groups.
    """
    convs, head = layers[:-1], layers[-1]
    if scheme.last_k > len(layers):
        raise ConfigError(f"scheme {scheme.name!r} trains the last {scheme.last_k} layers, the model has {len(layers)}")
    whole = layers[len(layers) - scheme.last_k :] or ([head] if scheme.head else [])
    channels, outputs = {layer.name: layer.in_channels for layer in whole}, {}
    named: set[str] = {layer.name for layer in layers[len(layers) - scheme.last_k :]}
    for entry in scheme.weights:
        for layer in _matches(entry.layer, layers, scheme):
            if layer.name in named:
                raise ConfigError(f"scheme {scheme.name!r} names layer {layer.name!r} twice")
            if entry.of == "inputs" and entry.share < 1 and layer.groups > 1 and layer.in_channels == 1:
                raise ConfigError(
                    f"scheme {scheme.name!r} trains a share of {entry.share} of layer {layer.name!r}, whose "
                    f"{layer.groups} groups have one input channel each, of which there is no share. Use share = 1, or "
                    "leave the layer out."
                )
            named.add(layer.name)
            if entry.of == "outputs" and entry.share < 1 and not layer.depthwise:
                outputs[layer.name] = _num_outputs(entry, layer, scheme, is_head=layer is head)
                channels[layer.name] = layer.in_channels
            else:
                channels[layer.name] = max(1, round(entry.share * layer.in_channels))
    count = len(convs) if scheme.last_biases == -1 else scheme.last_biases
    if count > len(convs) and not scheme.any_model:
        raise ConfigError(
            f"scheme {scheme.name!r} trains the biases of {count} convolutions, the model has {len(convs)}. Use "
            "last_biases = -1 for all."
        )
    count = min(count, len(convs))
    biases = {layer.name for layer in (*convs[len(convs) - count :], *whole)}
    if scheme.last_biases == -1:
        biases.add(head.name)
    return {
        layer.name: Trained(
            channels.get(layer.name, 0), layer.has_bias and layer.name in biases, outputs.get(layer.name, 0)
        )
        for layer in layers
    }


def choosing(scheme: Scheme, layers: Sequence[Layer]) -> set[str]:
    """Layers that train a share of their channels and not simply the first.

    Raises:
        ConfigError: The scheme names a layer that the model does not have.
    """
    entries = [entry for entry in scheme.weights if entry.choose == "largest" and entry.share < 1]
    return {layer.name for entry in entries for layer in _matches(entry.layer, layers, scheme)}


def _num_outputs(entry: LayerShare, layer: Layer, scheme: Scheme, *, is_head: bool) -> int:
    """How many outputs of a layer learn; 0 if that comes to all of them."""
    if is_head or layer.groups > 1:
        what = "the head, whose outputs are the classes" if is_head else f"a convolution in {layer.groups} groups"
        raise ConfigError(
            f"scheme {scheme.name!r} trains a share of {entry.share} of the outputs of layer {layer.name!r}, which is "
            f'{what}. Use of = "inputs".'
        )
    count = max(1, round(entry.share * layer.out_channels))
    return count if count < layer.out_channels else 0


def _matches(pattern: str, layers: Sequence[Layer], scheme: Scheme) -> Sequence[Layer]:
    convs = layers[:-1]
    if pattern == EVERY_LAYER:
        return convs
    for layer in layers:
        if layer.name == pattern:
            return [layer]
    sign, digits = pattern[:1], pattern[1:]
    position = int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 9 else -1
    if sign == "-" and 1 <= position <= len(convs):
        return [convs[-position]]
    if sign == "-" and position > len(convs) and scheme.any_model:
        return []
    if sign == "#" and 0 <= position < len(layers):
        return [layers[position]]
    names = [repr(layer.name) for layer in layers]
    if len(names) > _MOST_NAMES:
        names = [*names[: _MOST_NAMES // 2], "...", *names[-_MOST_NAMES // 2 :]]
    if not convs and sign == "-":
        remedy = "It needs a hidden convolution; use last_layer or full."
    else:
        last = len(layers) - 1
        remedy = f"Use one of them, or count convolutions back from -1, or layers from #0 to #{last}."
    raise ConfigError(f"scheme {scheme.name!r} names layer {pattern!r}; the model has {', '.join(names)}. {remedy}")

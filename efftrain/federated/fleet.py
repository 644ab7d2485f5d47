"""The simulated population: which device each client is, when it can be asked, how long its work takes and what of.

Everything is a function of the recipe's seed and the client's number, so nothing is kept for a client and a population
of any size costs nothing. What a device computes is real; how long it takes and what energy it needs is arithmetic:
download + multiply-accumulates / speed + upload, with the figures of its profile.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from efftrain.compression import Codec
from efftrain.errors import ConfigError
from efftrain.federated.checks import schemes_of
from efftrain.federated.client_uplink import Tensors, pack_mask
from efftrain.federated.data import client_train
from efftrain.federated.devices import DeviceProfile
from efftrain.federated.gate import is_trained
from efftrain.federated.local import corrects_gradients
from efftrain.federated.recipe import ClientConfig, FederatedRecipe, ModelConfig
from efftrain.ondevice.scheme import Scheme

_MOST_BATTERY = 0.05
"""A device is not asked for a training that would take a larger share of its battery than this."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one client's training needs of its device."""

    ram_bytes: int
    macs_per_sample: float
    """Forward and backward."""
    number_format: str
    masks: Mapping[str, npt.NDArray[np.bool_] | None] | None = None
    """Which elements are trained, as ``Trained.trained`` has it; None for all of them."""
    refusal: str = ""
    """Why the device cannot do it; empty if it can."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What all clients with the same device share."""

    device: str | None
    """Name of its profile; None where the recipe names no devices."""
    profile: DeviceProfile | None
    cost: Cost


@dataclass(frozen=True, kw_only=True)
class Trip:
    """One client's part in one round, planned before it starts."""

    duration_s: float
    """Download, training and upload."""
    energy_j: float
    ends_s: float | None = None
    """So long after its start the client drops out; None if it does not."""
    reason: str = ""


def device_of(recipe: FederatedRecipe, partition: int) -> str | None:
    """Name of the device profile of a client; None where the recipe names no devices."""
    devices = recipe.fleet.devices
    return _drawn_device(recipe.seed, tuple(devices.items()), partition) if devices else None


@lru_cache(maxsize=1 << 16)
def _drawn_device(seed: int, devices: tuple[tuple[str, float], ...], partition: int) -> str:
    left = _uniform(seed, "device", partition) * sum(share for _, share in devices)
    for name, share in devices:
        left -= share
        if left < 0:
            return name
    return devices[-1][0]


def client_config(recipe: FederatedRecipe, partition: int) -> ClientConfig:
    """How a client trains: the recipe's settings, with the update scheme that is meant for its device."""
    device = device_of(recipe, partition)
    return recipe.client if device is None else _config_of(recipe.client, recipe.fleet.schemes.get(device), device)


class Fleet:
    """The devices of a recipe's clients.

    Args:
        recipe: With ``fleet.devices``, or without: then every client answers at once, always, at no cost.
    """

    def __init__(self, recipe: FederatedRecipe) -> None:
        self._recipe = recipe
        self._kinds: dict[str | None, Kind] = {}
        self.has_devices = bool(recipe.fleet.devices)

    def kind(self, partition: int) -> Kind:
        """Device of a client, what training it once needs, and whether the device can do it."""
        if not self._kinds:
            self.check()
        return self._kinds[device_of(self._recipe, partition)]

    def check(self) -> None:
        """Plan the training of every device, before anything else runs: counting a model's operators disturbs whatever
        another thread computes meanwhile.

        Raises:
            ConfigError: An update scheme is none; or no device of the fleet can do the training, with the reason of the
                last one looked at.
        """
        for scheme in sorted(schemes_of(self._recipe) - {"fp32"}):
            Scheme.parse(scheme)
        refusals = []
        for device in self._recipe.fleet.devices or (None,):
            client = self._recipe.client
            if device is not None:
                client = _config_of(client, self._recipe.fleet.schemes.get(device), device)
            cost = _cost(self._recipe, client, device)
            profile = None if device is None else DeviceProfile.named(device)
            self._kinds[device] = Kind(device=device, profile=profile, cost=cost)
            refusals.append(cost.refusal)
        if not all(refusals):
            return
        if not self.has_devices:
            raise ConfigError(refusals[-1])
        advice = "Name other devices or schemes (fleet.devices, fleet.schemes)."
        if client.scheme == "fp32":
            advice = (
                "Lower client.batch_size, give an update scheme of the device engine (fleet.schemes), or name other "
                "devices."
            )
        raise ConfigError(f"no device of the fleet can do this training: {refusals[-1].rstrip('.')}. {advice}")

    def refusals(self) -> list[str]:
        """A line a device of the fleet that is never asked, because the training does not fit it."""
        return [
            f"clients with the device {device} are never asked: {kind.cost.refusal}"
            for device, kind in self._kinds.items()
            if device is not None and kind.cost.refusal
        ]

    def can_measure(self, partition: int) -> bool:
        """Whether a client can compute the model. In fp32 all can; in integers it needs its program."""
        cost = self.kind(partition).cost
        return cost.number_format == "fp32" or not cost.refusal

    def num_samples(self, partition: int) -> int:
        """Size of a client's training data."""
        data = self._recipe.data
        return data.samples_per_client if data.partition != "natural" else len(client_train(data, partition))

    def refusal(self, partition: int) -> str:
        """Why a client is never asked: its training does not fit its device. Empty if it does."""
        kind = self.kind(partition)
        device, cost = kind.profile, kind.cost
        if device is None:
            return ""
        if cost.refusal or not device.battery_j:
            return cost.refusal
        needed_j = device.compute_j(self._macs(partition, cost), cost.number_format)
        if needed_j > _MOST_BATTERY * device.battery_j:
            share = f"{_MOST_BATTERY:.0%}"
            return f"training takes {needed_j:.0f} J, more than {share} of the battery of a {kind.device}"
        return ""

    def uplink_bytes(self, partition: int, sent: Tensors, codec: Codec) -> int:
        """Of a client's reply to a model, at most: its payloads, and the masks of what it trains."""
        masks = self.kind(partition).cost.masks
        if masks is None:
            return sum(codec.encoded_bytes(tensor.size) for tensor in sent.values() if is_trained(tensor))
        payloads = (sent[name].size if mask is None else int(mask.sum()) for name, mask in masks.items())
        return sum(map(codec.encoded_bytes, payloads)) + sum(len(pack_mask(mask)) for mask in masks.values())

    def is_online(self, partition: int, time_s: float) -> bool:
        """Whether a client can be asked at a time."""
        device = self.kind(partition).profile
        if device is None or not self._recipe.fleet.availability:
            return True
        slot, _ = self._slot(device, partition, time_s)
        share = device.online_share(slot * device.slot_s)
        return _uniform(self._recipe.seed, "online", partition, slot) < share

    def trip(self, partition: int, number: int, time_s: float, downlink_bytes: int, uplink_bytes: int) -> Trip:
        """One client's part in a round.

        Args:
            partition: Number of the client.
            number: Of the training: every one has its own luck.
            time_s: When it starts.
            downlink_bytes: Of the message to it.
            uplink_bytes: Of its reply, at most.
        """
        seed, kind = self._recipe.seed, self.kind(partition)
        device, cost = kind.profile, kind.cost
        duration_s = energy_j = 0.0
        if device is not None:
            macs = self._macs(partition, cost)
            duration_s = device.download_s(downlink_bytes) + device.upload_s(uplink_bytes)
            duration_s += device.compute_s(macs, cost.number_format)
            energy_j = device.compute_j(macs, cost.number_format) + device.radio_j(uplink_bytes, downlink_bytes)
        ends_s, reason = None, ""
        if _uniform(seed, "drop", partition, number) < self._recipe.fleet.drop_out:
            ends_s = duration_s * _uniform(seed, "when", partition, number)
            reason = "dropped out in mid-round"
        if device is not None and self._recipe.fleet.availability:
            _, left_s = self._slot(device, partition, time_s)
            while left_s < (duration_s if ends_s is None else ends_s):
                if not self.is_online(partition, time_s + left_s + 1e-3):
                    ends_s, reason = left_s, "went offline in mid-round"
                    break
                left_s += device.slot_s
        share = 1.0 if ends_s is None or not duration_s else ends_s / duration_s
        return Trip(duration_s=duration_s, energy_j=share * energy_j, ends_s=ends_s, reason=reason)

    def _macs(self, partition: int, cost: Cost) -> float:
        return cost.macs_per_sample * self.num_samples(partition) * self._recipe.client.epochs

    def _slot(self, device: DeviceProfile, partition: int, time_s: float) -> tuple[int, float]:
        """The client's on/off slot at a time, and seconds left of it; not all clients switch at once."""
        shifted = time_s / device.slot_s + _uniform(self._recipe.seed, "shift", partition)
        return int(shifted), (int(shifted) + 1 - shifted) * device.slot_s


def _uniform(*parts: object) -> float:
    """A number in ``[0, 1)`` of these parts alone; a generator a client and question would cost 20 times as much."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2.0**64


@lru_cache(maxsize=64)
def _config_of(client: ClientConfig, scheme: str | None, device: str) -> ClientConfig:
    from efftrain.ondevice.target import Board

    client = replace(client, scheme=scheme or client.scheme)
    # A device that is no board has memory to plan for all the same, but nothing that an emulator could be.
    is_planned_for = device in Board.names() or client.engine != "board"
    return replace(client, board=device) if is_planned_for and client.scheme != "fp32" else client


def _cost(recipe: FederatedRecipe, client: ClientConfig, device: str | None) -> Cost:
    """Of one plan on one device; all clients with the same device share it."""
    samples = client_train(recipe.data, 0, recipe.seed)
    if client.scheme == "fp32":
        vectors = (client.momentum > 0) + corrects_gradients(recipe)
        cost = _float_cost(recipe.model, samples.input_shape, min(client.batch_size, len(samples)), vectors)
    else:
        cost = _int8_cost(recipe.model, client, samples.name)
    if device is None or cost.refusal:
        return cost
    ram_bytes = DeviceProfile.named(device).ram_bytes
    if cost.ram_bytes > ram_bytes:
        refusal = f"training needs {cost.ram_bytes} bytes of RAM, a {device} has {ram_bytes}"
        return replace(cost, refusal=refusal)
    return cost


@lru_cache(maxsize=16)
def _float_cost(config: ModelConfig, input_shape: tuple[int, ...], batch_size: int, vectors: int) -> Cost:
    """Weights, gradients and what the backward pass needs of a batch, counted by running the model once; and so many
    vectors of the model's size besides: velocities, what a strategy adds to the gradients."""
    import torch

    from efftrain.models import build_model
    from efftrain.profile import profile_model

    with torch.random.fork_rng(devices=[]):
        model = build_model(config.name, **config.options)
    profile = profile_model(model, torch.zeros(batch_size, *input_shape))
    macs = (profile.macs + profile.backward_macs) / batch_size
    ram_bytes = profile.training_bytes + vectors * 4 * sum(parameter.numel() for parameter in model.parameters())
    return Cost(ram_bytes=ram_bytes, macs_per_sample=macs, number_format="fp32")


@lru_cache(maxsize=16)
def _int8_cost(model: ModelConfig, client: ClientConfig, dataset: str) -> Cost:
    """Of the plan of the very program that the clients will run: every byte of it is known before anything runs."""
    from efftrain.federated.engines.int8_clients import compile_clients
    from efftrain.federated.engines.modules import fresh_state

    try:
        compiled = compile_clients(model, fresh_state(model, 0), client, dataset)
    except ConfigError as error:
        return Cost(ram_bytes=0, macs_per_sample=0.0, number_format="int8", refusal=str(error))
    if not compiled.masks:
        reason = f"the update scheme {client.scheme!r} trains nothing; choose another, such as 'sparse'"
        return Cost(ram_bytes=0, macs_per_sample=0.0, number_format="int8", refusal=reason)
    plan = compiled.program.plan
    macs = plan.macs_forward + plan.macs_backward
    return Cost(ram_bytes=plan.total_ram_bytes, macs_per_sample=macs, number_format="int8", masks=compiled.masks)

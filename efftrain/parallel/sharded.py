"""The data axis with divided weights: torch's ``fully_shard``, gradients optionally through a codec."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from efftrain.compression import Codec, Identity
from efftrain.errors import CheckpointError, ConfigError
from efftrain.parallel.backends import Transport
from efftrain.parallel.hooks import CompressedReduceScatter, compress_fsdp
from efftrain.parallel.replicas import Replicas, count_ranks, start_equal

_LARGE = 1 << 20
"""A layer of a ``Sequential`` with so many parameters is gathered on its own."""


class Sharded(Replicas):
    """Divides weights, gradients and optimizer state over the data axis; an ``Exchange`` of the training step.

    ``ManyAxes`` asks for it. A parameter without a gradient on any rank has none; one without on some ranks only is
    refused: torch packs the gradients of a layer that there are, and would add up those of different parameters.

    Args:
        transport: The data axis.
        mesh: The same ranks, one dimension, or two: copies, and ranks that share one.
        codec: Encodes the reduce-scatter of the gradients; ``Identity`` leaves it to torch.
        free_weights: Give the gathered weights of a layer back after its forward pass and gather them again for the
            backward pass. Less memory, more bytes.
        stages: Parts of the model that are called on their own, and so are divided on their own; none if the model is
            called as a whole.
        seed: Of stochastic rounding.

    Source: Rajbhandari et al., ZeRO (arXiv:1910.02054): stage 3 with ``free_weights``, else stage 2.
    """

    is_divided = True

    def __init__(
        self,
        transport: Transport,
        mesh: DeviceMesh,
        *,
        codec: Codec,
        free_weights: bool,
        stages: Sequence[nn.Module] = (),
        seed: int = 0,
    ) -> None:
        super().__init__(transport)
        self._mesh, self._stages = mesh, stages
        self._codec, self._free_weights, self._seed = codec, free_weights, seed
        self._roots: list[FSDPModule] = []
        self._codecs: list[CompressedReduceScatter] = []
        self._num_parameters = 0
        self._num_steps = 0
        self._trained: dict[str, Tensor] = {}
        self._absent: list[str] = []

    def wrap(self, model: nn.Module) -> nn.Module:
        """Give all ranks the weights of rank 0, then divide them. Returns the model itself."""
        start_equal(self._transport, model)
        for part in self._stages or [model]:
            self._num_parameters += sum(p.numel() for p in part.parameters())
            for name in reversed(_layers(part)):  # the inner one of two first: what is left goes to the outer one
                layer = part.get_submodule(name)
                fully_shard(layer, mesh=self._mesh, reshard_after_forward=self._free_weights)
            self._roots.append(fully_shard(part, mesh=self._mesh, reshard_after_forward=self._free_weights))
            if not isinstance(self._codec, Identity):
                self._codecs.append(compress_fsdp(part, self._codec, seed=self._seed))
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        return model

    @contextmanager
    def local_only(self) -> Iterator[None]:
        """Gradients inside are summed up and not sent; they take the memory of whole ones."""
        for root in self._roots:
            root.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            for root in self._roots:
                root.set_requires_gradient_sync(True)

    def check_replicas(self, model: nn.Module) -> None:
        """There is one copy of each weight, or copies that no code of ours writes apart."""

    def finish(self) -> bool:
        """The backward pass has reduced already; inf and NaN are in the sum."""
        self._num_steps += 1
        self._absent = [name for name, parameter in self._trained.items() if parameter.grad is None]
        return True

    @property
    def lacks_gradients(self) -> bool:
        """See ``Exchange``."""
        return bool(self._absent)

    def leave_out(self) -> None:
        """torch has left them out.

        Raises:
            ConfigError: A parameter has a gradient on some ranks only; on all ranks.
        """
        names = list(self._trained)
        for name, count in zip(names, count_ranks(self._transport, names, self._absent), strict=True):
            if 0 < count < self.world_size:
                raise ConfigError(
                    f"{name} has a gradient on {count} of {self.world_size} ranks of the data axis; divided weights "
                    "need the same layers in use on all ranks: take shard=none"
                )

    def settle(self, ok: bool) -> None:
        """Keep or forget what the codec left unsent in this step."""
        for codec in self._codecs:
            codec.settle(ok)

    def residual_norm(self) -> float:
        """Of what this rank's codec has not sent yet."""
        kept = (value for name, value in self.state_dict().items() if not name.endswith("/num_steps"))
        return float(sum(float(torch.linalg.vector_norm(value)) ** 2 for value in kept) ** 0.5)

    def stats(self) -> dict[str, float]:
        """Of the steps since the last call. ``wire_bytes``: weights gathered once or twice, and gradients as sent."""
        share = 4 * self._num_parameters * (self.world_size - 1) / self.world_size * self._num_steps
        gathered = share * (2 if self._free_weights else 1)
        self._num_steps = 0
        found = {"wire_bytes": 0.0, "encode_s": 0.0, "exchange_s": 0.0, "decode_s": 0.0}
        for codec in self._codecs:
            for name, value in codec.stats().items():
                found[name] = found.get(name, 0.0) + value
        if not self._codecs:
            found = {"wire_bytes": share}
        found["wire_bytes"] += gathered
        return {**found, "uncompressed_bytes": gathered + share}

    def state_dict(self) -> dict[str, Tensor]:
        """This rank's feedback."""
        return {f"{i}/{name}": v for i, codec in enumerate(self._codecs) for name, v in codec.state_dict().items()}

    def load_state_dicts(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Take this rank's feedback back, of as many ranks and the same layout.

        Raises:
            CheckpointError: The feedback is of another model.
        """
        own = states[self.rank]
        for name in own:
            if not name.partition("/")[0].isdigit() or int(name.partition("/")[0]) >= len(self._codecs):
                raise CheckpointError(f"feedback {name!r} fits no sharded module here")
        for i, codec in enumerate(self._codecs):
            prefix = f"{i}/"
            codec.load_state_dict({n.removeprefix(prefix): v for n, v in own.items() if n.startswith(prefix)})


def check_shards(parts: Sequence[nn.Module]) -> None:
    """Refuse what ``fully_shard`` cannot divide, before the ranks meet.

    Args:
        parts: The whole model, or its stages.

    Raises:
        ConfigError: A parameter is a scalar, or layers that are gathered one by one share it.
    """
    for part in parts:
        layers = _layers(part)
        places: dict[int, tuple[str, str]] = {}
        for path, module in part.named_modules():
            layer = max((name for name in layers if f"{path}.".startswith(f"{name}.")), key=len, default="")
            for last, parameter in module.named_parameters(recurse=False):
                name = f"{path}.{last}" if path else last
                if not parameter.ndim:
                    raise ConfigError(
                        f"parameter {name!r} is a scalar, which a sharded data axis cannot divide; give it the shape "
                        "(1,), or set parallel.shard=none"
                    )
                first, other = places.setdefault(id(parameter), (name, layer))
                if layer != other:
                    raise ConfigError(
                        f"parameters {first!r} and {name!r} are one and the same, in layers that a sharded data axis "
                        "gathers one by one; set parallel.shard=none, or give each layer its own"
                    )


def _layers(part: nn.Module) -> list[str]:
    """Names of the modules that are gathered on their own; an outer one is before those inside of it."""
    return [name for name, layer in part.named_modules() if name and _is_layer(part, name, layer)]


def _is_layer(part: nn.Module, name: str, layer: nn.Module) -> bool:
    """Whether a module is gathered on its own: a block of a stack, or a large layer."""
    path = name.rpartition(".")[0]
    parent = part.get_submodule(path)
    num_parameters = sum(p.numel() for p in layer.parameters(recurse=True))
    if not num_parameters or isinstance(layer, (nn.ModuleList, nn.Sequential)):
        return False
    if isinstance(parent, nn.ModuleList):
        return True
    return isinstance(parent, nn.Sequential) and num_parameters >= _LARGE

"""Codecs for scripts that keep their own DistributedDataParallel or ``fully_shard``: two doors of torch.

Each exchange runs to its end where torch asks for it, in the order that torch gives, so exchanges of two collectives
cannot hang as those do that continue in a callback. What that costs is overlap: a script that can should take a
``Plan``, whose ``GradSync`` sends beside the backward pass.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from efftrain.compression import Codec, Feedback, LowRank
from efftrain.errors import ConfigError
from efftrain.parallel.backends.torch import TorchTransport
from efftrain.parallel.collectives import Link, Piece, Steps, choose, reduce_scatter, refuse_deflate

# W ranks; S elements of a shard

_ReduceOp: TypeAlias = Any
"""``dist.ReduceOp`` or one of its kinds; torch has no common type for them."""


class CompressedHook:
    """A codec as DDP's communication hook. Made by ``compress_ddp``."""

    def __init__(self, model: DistributedDataParallel, codec: Codec, momentum: float, seed: int) -> None:
        self._codec, self._seed = codec, seed
        self._names = {id(p): name for name, p in model.module.named_parameters()}
        self._feedback = Feedback(momentum=momentum)
        device = next(model.parameters()).device
        transport = TorchTransport(device, model.process_group)
        self._link = Link(transport, self._feedback, 1 / transport.world_size)
        self._num_steps = 0

    def __call__(self, _: object, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """The mean of a bucket over all ranks. NaN, on all ranks, if some gradient is inf or NaN."""
        self._link.seed = self._seed + self._num_steps
        pieces = []
        for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
            values = gradient.reshape(-1).float().cpu().numpy()
            fitted = self._codec.for_tensor(tuple(gradient.shape))
            out = np.empty_like(values)
            pieces.append(Piece(self._names[id(parameter)], fitted, values, out, 0, values.size))
        algorithm = choose(pieces, self._link.transport.world_size)
        run(algorithm(pieces, self._link))
        for piece, gradient in zip(pieces, bucket.gradients(), strict=True):
            gradient.copy_(torch.from_numpy(piece.out).view_as(gradient))
        if not self._link.healthy:
            bucket.buffer().fill_(float("nan"))
        if bucket.is_last():
            self._feedback.settle(self._link.healthy)
            self._link.healthy = True
            self._num_steps += 1
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    def stats(self) -> dict[str, float]:
        """``wire_bytes``, ``encode_s`` and ``decode_s`` since the last call."""
        found = dict(self._link.stats)
        self._link.stats.clear()
        return found

    def state_dict(self) -> dict[str, Tensor]:
        """This rank's feedback, for its part of a checkpoint."""
        return {name: torch.from_numpy(value) for name, value in self._feedback.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what ``state_dict`` of this rank gave."""
        self._feedback.load_state_dict({name: value.numpy() for name, value in state.items()})


def compress_ddp(
    model: DistributedDataParallel, codec: Codec, *, momentum: float = 0.0, seed: int = 0
) -> CompressedHook:
    """Send the gradients of a DDP model through a codec, with error feedback.

    Args:
        model: Before its first backward pass; it keeps the hook.
        codec: Any but ``Identity``, which is what DDP does without.
        momentum: Of momentum correction (see ``compression.Feedback``); the optimizer then runs without.
        seed: Of stochastic rounding.

    Returns:
        The hook: its ``state_dict`` belongs into checkpoints, one a rank.

    Raises:
        ConfigError: The codec has nothing to encode.
    """
    refuse_deflate(codec)
    if codec.combine == "sum":
        raise ConfigError(f"{codec} is what DDP does by itself; leave the hook out")
    hook = CompressedHook(model, codec, momentum, seed)
    model.register_comm_hook(None, hook.__call__)
    return hook


class CompressedReduceScatter:
    """A codec as the reduce-scatter of ``fully_shard``. Made by ``compress_fsdp``.

    Weights are gathered as they were; gradients travel encoded. Residuals belong to the layout of a sharded module:
    ``state_dict`` goes back to the same number of ranks only.
    """

    def __init__(self, codec: Codec, seed: int) -> None:
        self._codec, self._seed = codec, seed
        self._feedback = Feedback()
        self._links: dict[dist.ProcessGroup, Link] = {}
        self._num_steps = 0
        self._healthy = True
        self._done: set[str] = set()

    def settle(self, ok: bool = True) -> None:
        """End a step: keep what it left unsent, or forget it if the step is skipped.

        A step that is not ended is kept when the next one begins.
        """
        self._feedback.settle(ok and self._healthy)
        self._healthy = True
        self._num_steps += 1
        self._done.clear()

    def stats(self) -> dict[str, float]:
        """``wire_bytes``, ``encode_s`` and ``decode_s`` since the last call."""
        found: dict[str, float] = {}
        for link in self._links.values():
            for name, value in link.stats.items():
                found[name] = found.get(name, 0.0) + value
            link.stats.clear()
        return found

    def state_dict(self) -> dict[str, Tensor]:
        """This rank's feedback of the steps that are settled, and how many they were: they seed the rounding."""
        feedback = {name: torch.from_numpy(value) for name, value in self._feedback.state_dict().items()}
        return {**feedback, "num_steps": torch.tensor(self._num_steps)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what ``state_dict`` of this rank gave."""
        self._num_steps = int(state.get("num_steps", torch.tensor(0)))
        self._feedback.load_state_dict({name: value.numpy() for name, value in state.items() if name != "num_steps"})

    def reduce(self, name: str, output: Tensor, shards: Tensor, group: dist.ProcessGroup, op: _ReduceOp) -> None:
        """Sum or mean of this rank's shard over all ranks; NaN if some rank's part of it is inf or NaN.

        Args:
            name: Of the sharded module.
            output: Shape ``(S,)``, overwritten.
            shards: Shape ``(W * S,)``, one shard for each rank.
            group: The ranks.
            op: ``SUM`` or ``AVG``.

        Raises:
            ConfigError: Another operation.
        """
        if op not in (dist.ReduceOp.SUM, dist.ReduceOp.AVG):
            raise ConfigError(f"a compressed reduce-scatter knows SUM and AVG, not {op}; leave the divide factor alone")
        if name in self._done:
            self.settle()
        self._done.add(name)
        if group not in self._links:
            self._links[group] = Link(TorchTransport(output.device, group), self._feedback, 1.0)
        link = self._links[group]
        link.seed, link.healthy = self._seed + self._num_steps, True
        values = shards.reshape(-1).float().cpu().numpy()
        total = np.empty(output.numel(), np.float32)
        piece = Piece(name, self._codec.for_tensor((values.size,)), values, total, 0, values.size)
        run(reduce_scatter(piece, link))
        if op == dist.ReduceOp.AVG:
            total /= link.transport.world_size
        output.copy_(torch.from_numpy(total))
        if not link.healthy:
            output.fill_(float("nan"))
            self._healthy = False


class _OfModule:
    """What one sharded module calls; torch's ``ReduceScatter``."""

    def __init__(self, owner: CompressedReduceScatter, name: str) -> None:
        self._owner, self._name = owner, name

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Fresh memory for an exchange."""
        return torch.empty([int(n) for n in size], dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: _ReduceOp,
        async_op: bool = False,
    ) -> None:
        """Reduce-scatter, finished when it returns."""
        self._owner.reduce(self._name, output_tensor, input_tensor, group, op)


def compress_fsdp(model: nn.Module, codec: Codec, *, seed: int = 0) -> CompressedReduceScatter:
    """Send the gradients of a model under ``fully_shard`` through a codec, with error feedback.

    Args:
        model: Sharded already: ``fully_shard`` was called on it, and on what parts of it should be.
        codec: Any that has no need of whole matrices.
        seed: Of stochastic rounding.

    Returns:
        The exchange: ``settle`` it after each step if steps may be skipped; its ``state_dict`` belongs into
        checkpoints, one a rank.

    Raises:
        ConfigError: Nothing is sharded, or the codec is ``LowRank`` or has nothing to encode.
    """
    refuse_deflate(codec)
    if isinstance(codec, LowRank) or codec.combine == "sum":
        raise ConfigError(f"{codec} cannot encode the shards of a module; take TopK, Int8 or another gathered codec")
    sharded = [(name, module) for name, module in model.named_modules() if isinstance(module, FSDPModule)]
    if not sharded:
        raise ConfigError("the model has no sharded module; call fully_shard before compress_fsdp")
    exchange = CompressedReduceScatter(codec, seed)
    for name, module in sharded:
        comm: Any = _OfModule(exchange, name or "(root)")
        module.set_custom_reduce_scatter(comm)
    return exchange


def run(steps: Steps) -> None:
    """An exchange from its first collective to its last, without a pause."""
    pending = next(steps)
    while True:
        try:
            pending = steps.send(pending.wait())
        except StopIteration:
            return

"""The data axis: DistributedDataParallel with codecs on its wire.

The path of a gradient: DDP fills a bucket -> for each parameter in it, ``Feedback`` adds what earlier steps left unsent
and the codec encodes -> one all-gather of bytes a bucket, in the order in which DDP hands buckets out -> every rank
decodes the messages of all ranks in rank order into the bucket, so that the replicas stay equal to the bit.
"""

import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.nn.parallel import DistributedDataParallel

from efftrain.compression import Codec, Feedback, redistribute
from efftrain.errors import ConfigError, NonFiniteError

# W ranks; one bucket holds several parameters


class DataParallel:
    """Averages gradients over all processes; an ``Exchange`` of the training step.

    Args:
        codec: Encodes the gradients. One whose payloads combine by ``sum`` (``Identity``) becomes DDP's own all-reduce;
            the payloads of all others are gathered, decoded and added.
        momentum: Of the feedback's momentum correction; the optimizer then runs without.
        seed: Of stochastic rounding; ranks, steps and parameters get different streams.
    """

    def __init__(self, codec: Codec, *, momentum: float = 0.0, seed: int = 0) -> None:
        if not codec.fixed_size:
            raise ConfigError(f"{codec} writes payloads of varying size, the gradient exchange needs equal ones")
        self.codec = codec
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._seed = seed
        self._feedback = Feedback(codec, momentum=momentum)
        self._names: dict[int, str] = {}
        self._model: DistributedDataParallel | None = None
        self._num_steps = 0
        self._took_part = True
        self._stats = _zero_stats()

    def wrap(self, model: nn.Module) -> nn.Module:
        """DDP over all processes, with the codec as its communication hook."""
        self._names = {id(p): name for name, p in model.named_parameters()}
        device = next(model.parameters()).device
        self._model = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
        hook = self._all_reduce if self.codec.combine == "sum" else self._gather
        self._model.register_comm_hook(None, hook)
        return self._model

    @contextmanager
    def local_only(self) -> Iterator[None]:
        """DDP's ``no_sync``."""
        assert self._model is not None, "local_only() before wrap()"
        with self._model.no_sync():
            yield

    def sum(self, values: Sequence[float]) -> list[float]:
        """One all-reduce of a few float64."""
        assert self._model is not None, "sum() before wrap()"
        device = next(self._model.parameters()).device
        tensor = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(tensor)
        return [float(v) for v in tensor.tolist()]

    def took_part(self) -> bool:
        """False after a gradient with inf or NaN on this rank; zeros were sent in its place."""
        return self._took_part

    def settle(self, ok: bool) -> None:
        """Keep the residuals of this step, or go back to those before it."""
        if ok:
            self._feedback.commit()
        else:
            self._feedback.rollback()
        self._took_part = True
        self._num_steps += 1

    def stats(self) -> dict[str, float]:
        """Of the steps since the last call, on this rank.

        ``wire_bytes``: bytes this rank sends to others, encoded: payload times ``W - 1`` for a gather, buffer times
        ``2 (W - 1) / W`` for a ring all-reduce. ``uncompressed_bytes``: what the all-reduce of the same gradients in
        fp32 sends. ``encode_s`` and ``decode_s``: time in the codec.
        """
        stats, self._stats = self._stats, _zero_stats()
        return stats

    def residual_norm(self) -> float:
        """Euclidean norm of what this rank has not sent yet."""
        return self._feedback.norm()

    def state_dict(self) -> dict[str, Tensor]:
        """This rank's feedback, and how many steps seeded the rounding."""
        feedback = {name: torch.from_numpy(value) for name, value in self._feedback.state_dict().items()}
        return {**feedback, "num_steps": torch.tensor(self._num_steps)}

    def load_state_dicts(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Take this rank's feedback back, or a fair share of all if the world size changed."""
        feedback = [{k: v.numpy() for k, v in state.items() if k != "num_steps"} for state in states]
        self._feedback.load_state_dict(
            feedback[self.rank] if len(states) == self.world_size else redistribute(feedback)
        )
        self._num_steps = int(states[0]["num_steps"]) if "num_steps" in states[0] else 0

    # Communication hooks ----------------------------------------------------------------------------------------

    def _all_reduce(self, _: object, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        buffer = bucket.buffer()
        ring_bytes = self._count_uncompressed(buffer)
        self._stats["wire_bytes"] += ring_bytes
        buffer.div_(self.world_size)
        work = dist.all_reduce(buffer, async_op=True)
        return work.get_future().then(_first)  # type: ignore[no-any-return]

    def _gather(self, _: object, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        started = time.perf_counter()
        buffer = bucket.buffer()
        self._count_uncompressed(buffer)
        names = [self._names[id(p)] for p in bucket.parameters()]
        sizes = [gradient.numel() for gradient in bucket.gradients()]
        messages = [
            torch.from_numpy(self._encode(name, gradient.reshape(-1)))
            for name, gradient in zip(names, bucket.gradients(), strict=True)
        ]
        message = torch.cat(messages).to(buffer.device)
        everyone = torch.empty(self.world_size * message.numel(), dtype=torch.uint8, device=buffer.device)
        self._stats["wire_bytes"] += (self.world_size - 1) * message.numel()
        self._stats["encode_s"] += time.perf_counter() - started
        work = _all_gather(everyone, message, async_op=True)

        def decode(_: torch.futures.Future[list[Tensor]]) -> Tensor:
            started = time.perf_counter()
            buffer.copy_(self._decode(everyone.cpu(), sizes))
            self._stats["decode_s"] += time.perf_counter() - started
            return buffer

        return work.get_future().then(decode)  # type: ignore[no-any-return]

    def _encode(self, name: str, gradient: Tensor) -> Any:
        key = zlib.crc32(f"{self._seed}:{self._num_steps}:{self.rank}:{name}".encode())
        try:
            return self._feedback.encode(name, gradient, key=key).data
        except NonFiniteError:
            # The others wait for a message of this size; the step is skipped by all once they have heard why.
            self._took_part = False
            return self.codec.encode(torch.zeros_like(gradient)).data

    def _decode(self, everyone: Tensor, sizes: Sequence[int]) -> Tensor:
        """Mean of the messages of all ranks: shape ``(sum(sizes),)``, float32."""
        mean = torch.zeros(sum(sizes))
        messages = everyone.view(self.world_size, -1)
        start = first_byte = 0
        for size in sizes:
            num_bytes = self.codec.encoded_bytes(size)
            for rank in range(self.world_size):
                message = messages[rank, first_byte : first_byte + num_bytes].numpy()
                self.codec.decode_add(message, mean[start : start + size], weight=1 / self.world_size)
            start, first_byte = start + size, first_byte + num_bytes
        return mean

    def _count_uncompressed(self, buffer: Tensor) -> float:
        ring_bytes = 2 * (self.world_size - 1) / self.world_size * 4 * buffer.numel()
        self._stats["uncompressed_bytes"] += ring_bytes
        return ring_bytes


# torch 2.13 renamed it and warns about the old name; the versions before know only that.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def _first(future: torch.futures.Future[list[Tensor]]) -> Tensor:
    return future.value()[0]


def _zero_stats() -> dict[str, float]:
    return {"wire_bytes": 0.0, "uncompressed_bytes": 0.0, "encode_s": 0.0, "decode_s": 0.0}

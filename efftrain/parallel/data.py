"""The data axis: DistributedDataParallel with codecs on its wire.

The path of a gradient: DDP fills a bucket -> for each parameter in it, ``Feedback`` adds what earlier steps left unsent
and the codec encodes -> one all-gather of bytes a bucket starts, in the order in which DDP hands buckets out, and runs
beside the rest of the backward pass -> after it, ``finish`` decodes the messages of all ranks in rank order into the
parameters' gradients, so that the replicas stay equal to the bit.

Note [no Python on gloo threads]
    A thread of gloo that lets go of a Python object while the interpreter ends aborts the process. So nothing is
    decoded in ``future.then``: the hook hands DDP its own bucket back at once, and the work is finished on the main
    thread. And nothing keeps the process group alive past ``mesh.process_group``, whose end waits for its threads.
"""

import time
import weakref
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
        bucket_mb: MiB of gradients that share an exchange; ``None`` leaves it to DDP. Smaller buckets start earlier
            and cost more latency.
    """

    def __init__(self, codec: Codec, *, momentum: float = 0.0, seed: int = 0, bucket_mb: float | None = None) -> None:
        if not codec.fixed_size:
            raise ConfigError(f"{codec} writes payloads of varying size, the gradient exchange needs equal ones")
        self.codec = codec
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._seed, self._bucket_mb = seed, bucket_mb
        self._feedback = Feedback(codec, momentum=momentum)
        self._pending: list[_Pending] = []
        self._names: dict[int, str] = {}
        # Weak: the reducer inside it holds our hook, and a circle through C++ would outlive the process group.
        self._model: weakref.ref[DistributedDataParallel] | None = None
        self._device = torch.device("cpu")
        self._num_steps = 0
        self._healthy = True
        self._ring_bytes = 0.0
        self._stats = _zero_stats()

    def wrap(self, model: nn.Module) -> nn.Module:
        """DDP over all processes, with the codec as its communication hook."""
        self._names = {id(p): name for name, p in model.named_parameters()}
        num_elements = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self._ring_bytes = 2 * (self.world_size - 1) / self.world_size * 4 * num_elements
        self._device = next(model.parameters()).device
        device_ids = [self._device.index] if self._device.type == "cuda" else None
        wrapped = DistributedDataParallel(model, device_ids=device_ids, bucket_cap_mb=self._bucket_mb)
        if self.codec.combine != "sum":
            wrapped.register_comm_hook(None, self._hook)
        self._model = weakref.ref(wrapped)
        return wrapped

    @contextmanager
    def local_only(self) -> Iterator[None]:
        """DDP's ``no_sync``."""
        wrapped = self._model() if self._model is not None else None
        assert wrapped is not None, "local_only() before wrap(), or its module is gone"
        with wrapped.no_sync():
            yield

    def sum(self, values: Sequence[float]) -> list[float]:
        """One all-reduce of a few float64."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self._device)
        dist.all_reduce(tensor)
        return [float(v) for v in tensor.tolist()]

    def sync_buffers(self, model: nn.Module) -> None:
        """One broadcast a buffer, as DDP does before each forward pass."""
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)

    def finish(self) -> bool:
        """Wait for the messages of this step and decode them into the gradients.

        Returns:
            False after a gradient with inf or NaN on this rank; zeros were sent in its place.
        """
        for exchange in self._pending:
            exchange.work.wait()
            started = time.perf_counter()
            self._decode(exchange)
            self._stats["decode_s"] += time.perf_counter() - started
        self._pending.clear()
        self._stats["uncompressed_bytes"] += self._ring_bytes
        if self.codec.combine == "sum":
            self._stats["wire_bytes"] += self._ring_bytes
        return self._healthy

    def settle(self, ok: bool) -> None:
        """Keep the residuals of this step, or go back to those before it."""
        if ok:
            self._feedback.commit()
        else:
            self._feedback.rollback()
        self._healthy = True
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

    def _hook(self, _: object, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """Encode a bucket and start its exchange. See Note [no Python on gloo threads]."""
        started = time.perf_counter()
        parameters = bucket.parameters()
        messages = [
            torch.from_numpy(self._encode(self._names[id(parameter)], gradient.reshape(-1)))
            for parameter, gradient in zip(parameters, bucket.gradients(), strict=True)
        ]
        message = torch.cat(messages).to(bucket.buffer().device)
        everyone = message.new_empty(self.world_size * message.numel())
        self._stats["wire_bytes"] += (self.world_size - 1) * message.numel()
        self._stats["encode_s"] += time.perf_counter() - started
        self._pending.append(_Pending(_all_gather(everyone, message, async_op=True), everyone, parameters))
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    def _encode(self, name: str, gradient: Tensor) -> Any:
        key = zlib.crc32(f"{self._seed}:{self._num_steps}:{self.rank}:{name}".encode())
        try:
            return self._feedback.encode(name, gradient, key=key).data
        except NonFiniteError:
            # The others wait for a message of this size; the step is skipped by all once they have heard why.
            self._healthy = False
            return self.codec.encode(torch.zeros_like(gradient)).data

    def _decode(self, exchange: "_Pending") -> None:
        messages = exchange.everyone.cpu().view(self.world_size, -1)
        first_byte = 0
        for parameter in exchange.parameters:
            mean = torch.zeros(parameter.numel())
            num_bytes = self.codec.encoded_bytes(parameter.numel())
            for rank in range(self.world_size):
                message = messages[rank, first_byte : first_byte + num_bytes].numpy()
                self.codec.decode_add(message, mean, weight=1 / self.world_size)
            assert parameter.grad is not None, "DDP left a parameter of its bucket without gradient"
            parameter.grad.copy_(mean.view_as(parameter))
            first_byte += num_bytes


@dataclass(frozen=True)
class _Pending:
    """A bucket on its way: ``everyone`` is uint8, ``(W * message bytes,)``, filled when ``work`` is done."""

    work: dist.Work
    everyone: Tensor
    parameters: Sequence[Tensor]


# torch 2.13 renamed it and warns about the old name; the versions before know only that.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def _zero_stats() -> dict[str, float]:
    return {"wire_bytes": 0.0, "uncompressed_bytes": 0.0, "encode_s": 0.0, "decode_s": 0.0}

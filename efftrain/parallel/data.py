"""The data axis without a codec: torch's DistributedDataParallel and its own all-reduce, the control of every codec."""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from efftrain.parallel.backends import Transport
from efftrain.parallel.collectives import ring_bytes
from efftrain.parallel.replicas import Replicas
from efftrain.training.exchange import local_grad_norm


class DataParallel(Replicas):
    """Averages gradients over all processes; an ``Exchange`` of the training step.

    Args:
        transport: All ranks, over torch.distributed.
        bucket_mb: MiB of gradients that share an all-reduce; ``None`` leaves it to DDP.
    """

    is_divided = False

    def __init__(self, transport: Transport, *, bucket_mb: float | None = None) -> None:
        super().__init__(transport)
        self._bucket_mb = bucket_mb
        # Weak: the reducer inside it would outlive the process group. See Note [no Python on gloo threads] in sync.py.
        self._model: weakref.ref[DistributedDataParallel] | None = None
        self._ring_bytes = 0.0
        self._num_steps = 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """DDP over all processes."""
        num_elements = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self._ring_bytes = ring_bytes(num_elements, self.world_size)
        device = next(model.parameters()).device
        device_ids = [device.index] if device.type == "cuda" else None
        wrapped = DistributedDataParallel(
            model, device_ids=device_ids, bucket_cap_mb=self._bucket_mb, gradient_as_bucket_view=True
        )
        self._model = weakref.ref(wrapped)
        return wrapped

    @contextmanager
    def local_only(self) -> Iterator[None]:
        """DDP's ``no_sync``."""
        wrapped = self._model() if self._model is not None else None
        assert wrapped is not None, "local_only() before wrap(), or its module is gone"
        with wrapped.no_sync():
            yield

    def finish(self) -> bool:
        """DDP has waited already; inf and NaN are in the mean of all ranks."""
        self._num_steps += 1
        return True

    def grad_norm(self, model: nn.Module) -> Tensor:
        """All ranks hold the whole average."""
        return local_grad_norm(model)

    def settle(self, ok: bool) -> None:
        """Nothing is staged."""

    def stats(self) -> dict[str, float]:
        """Of the steps since the last call: bytes that a ring all-reduce in fp32 sends; nothing is encoded."""
        num_bytes, self._num_steps = self._num_steps * self._ring_bytes, 0
        return {"wire_bytes": num_bytes, "uncompressed_bytes": num_bytes}

    def residual_norm(self) -> float:
        """Nothing is left unsent."""
        return 0.0

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing to remember."""
        return {}

    def load_state_dicts(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Feedback of a compressed run, if the checkpoint has any, is not needed by an uncompressed one."""

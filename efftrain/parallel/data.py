"""The data axis without a codec: torch's DistributedDataParallel and its own all-reduce, the control of every codec."""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from efftrain.parallel.backends import Transport
from efftrain.parallel.collectives import ring_bytes
from efftrain.parallel.replicas import Replicas, count_ranks


class DataParallel(Replicas):
    """Averages gradients over all processes; an ``Exchange`` of the training step.

    A parameter without a gradient on some ranks counts as zero there; one without any on all ranks has none
    (``leave_out``). DDP's own way to that, ``find_unused_parameters``, searches the graph and asks all ranks in every
    step; ours costs nothing where every parameter has a gradient.

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
        self._trained: dict[str, Tensor] = {}
        self._reduced: set[str] = set()
        """Parameters whose gradient of this step DDP has got."""
        self._absent: list[str] = []

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
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for name, parameter in self._trained.items():
            hook = partial(_on_gradient, self._reduced, name)
            parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
        return wrapped

    @contextmanager
    def local_only(self) -> Iterator[None]:
        """DDP's ``no_sync``."""
        wrapped = self._model() if self._model is not None else None
        assert wrapped is not None, "local_only() before wrap(), or its module is gone"
        with wrapped.no_sync():
            yield
        self._reduced.clear()

    def finish(self) -> bool:
        """Give DDP zeros for what it still waits for; it waits for the others itself.

        inf and NaN are in the mean of all ranks.
        """
        late = [name for name in self._trained if name not in self._reduced]
        self._absent = [name for name in late if self._trained[name].grad is None]
        if late:
            # The end of the backward pass, as far as DDP knows: its hooks fire, and it waits for the last bucket.
            torch.autograd.backward([self._trained[name].sum() * 0 for name in late])
        self._reduced.clear()
        self._num_steps += 1
        return True

    @property
    def lacks_gradients(self) -> bool:
        """See ``Exchange``."""
        return bool(self._absent)

    def leave_out(self) -> None:
        """See ``Exchange``."""
        names = list(self._trained)
        for name, count in zip(names, count_ranks(self._transport, names, self._absent), strict=True):
            if not count:
                self._trained[name].grad = None

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


def _on_gradient(reduced: set[str], name: str, _: Tensor) -> None:
    reduced.add(name)

"""The axes of a plan as groups of processes, and the exchange of a rank that belongs to several of them.

Ranks are numbered pipeline first, then data, then tensor: the ranks of a tensor axis, which talk most, are neighbors.
"""

# P, D, T: sizes of the pipeline, data and tensor axis; D = R x S with replicas of S sharding ranks

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from efftrain.parallel.backends import Transport
from efftrain.parallel.backends.torch import TorchTransport
from efftrain.parallel.feedback import AXES, axes_of, forget, of_replicas
from efftrain.parallel.local import local, local_grad
from efftrain.parallel.replicas import TransportLine, broadcast, check_replicas, sum_numbers
from efftrain.training import Exchange
from efftrain.training.exchange import Agreement


@dataclass(frozen=True, eq=False)
class Axes:
    """The mesh of a run. Inside ``mesh.process_group`` only.

    Args:
        device: Of this rank.
        pipeline: ``P``.
        data: ``D``.
        tensor: ``T``.
        shard: ``S``: ranks that share one copy of the weights, a divisor of ``D``.
    """

    device: torch.device
    pipeline: int
    data: int
    tensor: int
    shard: int
    mesh: DeviceMesh
    """Its dimensions are ``pipeline``, ``replicate``, ``shard`` and ``tensor``."""
    replicas: DeviceMesh
    """``replicate`` and ``shard`` in one: the data axis."""

    @classmethod
    def make(cls, device: torch.device, *, pipeline: int, data: int, tensor: int, shard: int) -> "Axes":
        """Every rank of all processes calls it."""
        sizes = (pipeline, data // shard, shard, tensor)
        mesh = init_device_mesh(device.type, sizes, mesh_dim_names=("pipeline", "replicate", "shard", "tensor"))
        return cls(device, pipeline, data, tensor, shard, mesh, mesh["replicate", "shard"]._flatten("data"))

    def world(self) -> TorchTransport:
        """All ranks."""
        return TorchTransport(self.device)

    def transport(self, axis: str) -> TorchTransport:
        """The ranks that differ from this one in this axis only: ``pipeline``, ``data`` or ``tensor``."""
        return TorchTransport(self.device, self.axis(axis).get_group())

    def place(self, axis: str) -> int:
        """This rank's number on an axis."""
        return int(self.axis(axis).get_local_rank())

    def axis(self, name: str) -> DeviceMesh:
        """The mesh of one axis."""
        return self.replicas if name == "data" else self.mesh[name]


class ManyAxes(TransportLine):
    """An ``Exchange`` of a rank whose model is divided: the data axis exchanges, the others only agree.

    Args:
        axes: The mesh.
        inner: The exchange of the data axis.
        world: All ranks.
        shared: Parameters of this rank that other stages use, too, and the ranks of the pipeline that hold them. Their
            gradients are added up when the data axis is through, so that all copies move alike to the bit.
    """

    is_divided = True

    def __init__(
        self, axes: Axes, inner: Exchange, world: Transport, shared: Sequence[tuple[Tensor, Transport]] = ()
    ) -> None:
        super().__init__(world)
        self.replica, self.num_replicas = inner.replica, inner.num_replicas
        self.axes = f"pipeline={axes.pipeline} data={self.num_replicas} tensor={axes.tensor}"
        self._axes, self._inner, self._shared = axes, inner, shared
        self._sizes = (axes.pipeline, axes.data, axes.tensor, axes.shard)
        self._model: nn.Module | None = None
        self._has_shared: list[bool] = []
        """Of each shared parameter, whether this stage gave it a gradient."""
        self._shares: list[tuple[Tensor, float]] = []
        """Parameters, and one over the number of ranks that hold the same piece."""

    def wrap(self, model: nn.Module) -> nn.Module:
        """Let the data axis set its hooks on what this rank holds, behind those that lay gradients out."""
        self._model = model
        for parameter in model.parameters():
            if isinstance(parameter, DTensor) and parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(settle_layout)  # type: ignore[no-untyped-call]
        wrapped = self._inner.wrap(model)
        for shared, ranks in self._shared:
            broadcast(ranks, shared)
        self._shares = [(p, 1 / self._copies(p)) for p in model.parameters()]
        return wrapped

    def local_only(self) -> AbstractContextManager[None]:
        """See ``Exchange``."""
        return self._inner.local_only()

    def sync_buffers(self, model: nn.Module) -> None:
        """Over the data axis; the ranks of a tensor axis saw the same samples."""
        self._inner.sync_buffers(model)

    def check_replicas(self, model: nn.Module) -> None:
        """Over the data axis, and what is not divided over the tensor axis, too."""
        self._inner.check_replicas(model)
        if self._axes.tensor > 1:
            whole = [p for p in model.parameters() if not _is_divided(p)]
            check_replicas(self._axes.transport("tensor"), whole, "tensor")
        for shared, ranks in self._shared:
            check_replicas(ranks, [shared], "pipeline")

    @property
    def lacks_gradients(self) -> bool:
        """See ``Exchange``."""
        return self._inner.lacks_gradients or not all(self._has_shared)

    def leave_out(self) -> None:
        """Over the data axis; what stages share has a gradient if one of them has, on all of them."""
        sums = [shared.grad for shared, _ in self._shared]
        self._inner.leave_out()
        for (shared, ranks), had, total in zip(self._shared, self._has_shared, sums, strict=True):
            [count] = sum_numbers(ranks, [float(had and shared.grad is not None)])
            shared.grad = total if count else None

    def finish(self) -> bool:
        """See ``Exchange``."""
        assert self._model is not None, "finish() before wrap()"
        for parameter in self._model.parameters():
            settle_layout(parameter)  # of schedules whose weight gradients come past the hooks
        took_part = self._inner.finish()
        self._has_shared = [shared.grad is not None for shared, _ in self._shared]
        for shared, ranks in self._shared:
            ranks.all_reduce(local_grad(shared)).wait()
        return took_part

    def agree(self, model: nn.Module, loss: Tensor, *, took_part: bool) -> Agreement:
        """See ``Exchange``; the norm's parts travel with the rest."""
        own, squares = float(loss), self._squares()
        healthy = took_part and math.isfinite(own) and math.isfinite(squares)
        known = [own, squares] if healthy else [0.0, 0.0]
        num_healthy, total, squares, lacking = self.sum([healthy, *known, self.lacks_gradients])
        healthy = num_healthy == self.world_size
        if lacking and healthy:
            self.leave_out()
            [squares] = self.sum([self._squares()])
        norm = torch.tensor(squares).sqrt()
        return Agreement(healthy and bool(torch.isfinite(norm)), total / self.num_replicas, norm)

    def _squares(self) -> float:
        """Of the gradients that this rank holds; all ranks together count each piece once."""
        grads = [(local(p.grad), share) for p, share in self._shares if p.grad is not None]
        if not grads:
            return 0.0
        norms = torch.stack(torch._foreach_norm([grad for grad, _ in grads])).tolist()
        return sum((norm**2 * share for norm, (_, share) in zip(norms, grads, strict=True)), 0.0)

    def settle(self, ok: bool) -> None:
        """See ``Exchange``."""
        self._inner.settle(ok)

    def residual_norm(self) -> float:
        """See ``Exchange``."""
        return self._inner.residual_norm()

    def stats(self) -> dict[str, float]:
        """Of the data axis; activations are not counted."""
        return self._inner.stats()

    def state_dict(self) -> dict[str, Tensor]:
        """This rank's feedback, and the axes that it belongs to."""
        return {**self._inner.state_dict(), AXES: torch.tensor(self._sizes)}

    def load_state_dicts(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Take this rank's part back; see ``feedback`` for other axes."""
        tensor, place = self._axes.tensor, self._axes.place("tensor")
        if self._axes.shard > 1:
            if axes_of(states) != self._sizes:
                forget(states)
                return
            data, stage = self._axes.data, self._axes.place("pipeline")
            own = [states[(stage * data + replica) * tensor + place] for replica in range(data)]
            self._inner.load_state_dicts([{k: v for k, v in state.items() if k != AXES} for state in own])
            return
        replicas = of_replicas(states, tensor=tensor, place=place)
        if replicas is not None and self._model is not None:
            names = {name for name, _ in self._model.named_parameters()}
            self._inner.load_state_dicts(
                [{k: v for k, v in state.items() if "/" not in k or k.partition("/")[2] in names} for state in replicas]
            )

    def _copies(self, parameter: Tensor) -> float:
        """Ranks that hold the same piece of a parameter."""
        divided = 1
        stages = next((ranks.world_size for shared, ranks in self._shared if shared is parameter), 1)
        if isinstance(parameter, DTensor):
            sizes = zip(parameter.placements, parameter.device_mesh.shape, strict=True)
            divided = math.prod(size for placement, size in sizes if not placement.is_replicate())
        return stages * self._axes.data * self._axes.tensor / divided


def _is_divided(parameter: Tensor) -> bool:
    return isinstance(parameter, DTensor) and any(
        name == "tensor" and not placement.is_replicate()
        for name, placement in zip(parameter.device_mesh.mesh_dim_names or (), parameter.placements, strict=True)
    )


def settle_layout(parameter: Tensor) -> None:
    """Give a gradient the layout of its parameter: it may come as parts that the ranks of the tensor axis add up."""
    grad = parameter.grad
    if isinstance(grad, DTensor) and isinstance(parameter, DTensor) and grad.placements != parameter.placements:
        parameter.grad = grad.redistribute(placements=parameter.placements)

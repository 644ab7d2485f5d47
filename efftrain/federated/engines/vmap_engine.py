"""The ``vmap`` engine: clients of several threads stacked by ``torch.func`` and trained in one go.

Meant for GPUs, where one client's operators are far too small; it uses CUDA where there is one. (Its results were
checked on CPUs only.) On a CPU it is about as fast as the ``torch`` engine, faster for models of tiny operators.

Note [stacks]
    Clients come one by one, from any thread: ``train`` waits for others of the same model, shapes and settings, until
    ``client.stack`` of them are there or for a moment nobody has come. Whoever notices trains all of them, the others
    wait for their result. So as many threads as ``client.stack`` (``fleet.workers``) fill a stack; with fewer, most of
    it is padding.

    Equal arguments must give equal bits, whoever is in the stack and wherever in it. So the width is always the same,
    missing members are padding, and every operator must treat all places alike. Of those that PyTorch has for stacks,
    only the matrix products do not: where a matrix lies in memory, modulo a cache line, decides the order in which the
    kernel adds up. ``_Product`` therefore puts all matrices at multiples of one. Layers that were not checked for it
    are refused.

    Batches are padded to ``client.batch_size``, with weight 0 in the loss; a client with fewer steps than the others
    stays as it is meanwhile.
"""

import copy
import threading
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from efftrain.data import ArrayDataset
from efftrain.errors import ConfigError, PeerError
from efftrain.federated.engines import Correction, Measured, State, Trained
from efftrain.federated.engines.modules import blank_module, fresh_state, torch_threads
from efftrain.federated.engines.torch_engine import TorchEngine, check_finite, check_scheme
from efftrain.federated.local import num_steps
from efftrain.federated.recipe import ClientConfig, ModelConfig

# W members of a stack, S steps, B samples of a batch.

_PATIENCE_S = 0.02
"""A stack that nobody has joined for so long starts as it is: many times what a client does between two trainings."""
_LANES = 16
"""Floats in a cache line."""
_CHECKED = (nn.Conv1d, nn.Conv2d, nn.Linear, nn.ReLU, nn.MaxPool1d, nn.MaxPool2d, nn.AdaptiveAvgPool1d, nn.Flatten)
"""Layers whose results do not depend on the place in a stack; see ``tests/property/test_federated_stacks.py``."""


@dataclass(eq=False)
class _Member:
    """One client in a stack."""

    state: State
    data: ArrayDataset
    seed: int
    correction: Correction
    result: Trained | None = None
    error: BaseException | None = None
    total: float = 0.0


@dataclass(eq=False)
class _Stack:
    members: list[_Member] = field(default_factory=list)
    joined_s: float = 0.0
    """When the last one came."""
    started: bool = False
    finished: bool = False


class VmapEngine:
    """See ``Engine`` and Note [stacks]. Measuring is the torch engine's."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._open: list[tuple[tuple[Any, ...], _Stack]] = []
        self._torch = TorchEngine()

    def initial_state(self, model: ModelConfig, seed: int) -> State:
        """The same as the torch engine's."""
        return fresh_state(model, seed)

    def train(
        self,
        model: ModelConfig,
        state: State,
        data: ArrayDataset,
        config: ClientConfig,
        seed: int,
        correction: Correction | None = None,
    ) -> Trained:
        """As the torch engine with the same arguments, up to rounding.

        Raises:
            ConfigError: ``config.scheme`` is not ``fp32``, or the model has layers that cannot be stacked.
            NonFiniteError: The loss of this client became inf or NaN.
            PeerError: The thread that trained this client's stack gave no result within ``config.timeout_s``.
        """
        check_scheme(config)
        _check_fits(model, state, data, correction)
        member = _Member(state, data, seed, correction or Correction())
        key = (model, data.input_shape, config, member.correction.mu, tuple(sorted(member.correction.offset)))
        end_s = time.monotonic() + config.timeout_s
        with self._changed:
            stack = self._join(key, member, config.stack)
            while not stack.finished and not self._may_start(stack, config.stack):
                if time.monotonic() >= end_s:
                    raise PeerError(
                        "the thread that trains this client's stack gave no result within client.timeout_s "
                        f"({config.timeout_s:g} s)"
                    )
                limit_s = end_s if stack.started else min(end_s, stack.joined_s + _PATIENCE_S)
                self._changed.wait(min(60.0, max(0.0, limit_s - time.monotonic())))
            leads = not stack.finished
            if leads:
                stack.started = True
                self._open = [entry for entry in self._open if entry[1] is not stack]
        if leads:
            self._lead(model, stack, config)
        if member.error is not None:
            raise member.error
        check_finite(member.total, config)
        assert member.result is not None, "a stack without an error has a result for every member"
        return member.result

    def evaluate(self, model: ModelConfig, state: State, data: ArrayDataset, config: ClientConfig) -> Measured:
        """See ``Engine.evaluate``."""
        return self._torch.evaluate(model, state, data, config)

    def _join(self, key: tuple[Any, ...], member: _Member, width: int) -> _Stack:
        found = [stack for known, stack in self._open if known == key]
        stack = found[0] if found else _Stack()
        if not found:
            self._open.append((key, stack))
        stack.members.append(member)
        stack.joined_s = time.monotonic()
        if len(stack.members) == width:
            self._open = [entry for entry in self._open if entry[1] is not stack]
        return stack

    def _may_start(self, stack: _Stack, width: int) -> bool:
        waited_s = time.monotonic() - stack.joined_s
        return not stack.started and (len(stack.members) == width or waited_s >= _PATIENCE_S)

    def _lead(self, model: ModelConfig, stack: _Stack, config: ClientConfig) -> None:
        error: BaseException | None = None
        try:
            _train(model, stack.members, config)
        except RuntimeError as found:  # how torch says that it cannot
            error = ConfigError(
                f"{model.name} cannot be trained by the vmap engine: {found}. Lower client.stack ({config.stack}), or "
                'set client.engine="torch".'
            )
        except BaseException as found:
            error = found
        with self._changed:
            for member in stack.members if error is not None else ():
                member.error = error
            stack.finished = True
            self._changed.notify_all()


def check_layers(model: ModelConfig) -> None:
    """See Note [stacks].

    Raises:
        ConfigError: The model has layers that cannot be stacked.
    """
    strange = [layer for layer in blank_module(model).modules() if not isinstance(layer, _CHECKED) and _computes(layer)]
    if strange:
        raise ConfigError(
            f"{model.name} cannot be trained by the vmap engine: its layer {type(strange[0]).__name__} may compute "
            'something else in a stack than alone. Set client.engine="torch".'
        )


def _check_fits(model: ModelConfig, state: State, data: ArrayDataset, correction: Correction | None) -> None:
    """Before a stack is joined: what is wrong with one member must not be the others' problem."""
    check_layers(model)
    module = blank_module(model)
    own = {name: tuple(tensor.shape) for name, tensor in module.named_parameters()}
    for name in own.keys() | state.keys():
        found, expected = (state[name].shape if name in state else "nothing"), own.get(name, "nothing")
        if found != expected:
            raise ConfigError(f"these tensors are no {model.name}: {name!r} has shape {found}, expected {expected}")
    for name, tensor in ({} if correction is None else correction.offset).items():
        if tensor.shape != own.get(name):
            raise ConfigError(f"the correction of {name!r} has shape {tensor.shape}, expected {own.get(name)}")
    shape = getattr(module, "input_shape", data.input_shape)
    if data.input_shape != tuple(shape) or not len(data):
        raise ConfigError(
            f"a client has {len(data)} samples of shape {data.input_shape}, {model.name} takes some of shape {shape}"
        )


def _computes(layer: nn.Module) -> bool:
    """Whether a module does more than call others: it has tensors of its own, or nothing inside."""
    own = (*layer.parameters(recurse=False), *layer.buffers(recurse=False))
    return bool(own) or not any(True for _ in layer.children())


def _train(model: ModelConfig, members: list[_Member], config: ClientConfig) -> None:
    """Train all of them and write down their results. A member that diverges disturbs nobody else."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # Weights of whoever used the module last; ``functional_call`` puts others in their place, which only one may do.
    module = copy.deepcopy(_stackable(model)).to(device)
    exact = torch.backends.cudnn.flags(deterministic=True, benchmark=False, allow_tf32=False)
    with torch_threads(config.threads), exact if device.type == "cuda" else nullcontext(), torch.no_grad():
        totals, weights = _descend(module, [*members, *members[-1:] * (config.stack - len(members))], config, device)
        for w, member in enumerate(members):
            num = len(member.data)
            member.total = float(totals[w])
            state = {name: weights[name][w].numpy().copy() for name in member.state}
            member.result = Trained(state, member.total / (config.epochs * num), num)


def _descend(
    module: nn.Module, members: list[_Member], config: ClientConfig, device: torch.device
) -> tuple[npt.NDArray[np.float64], dict[str, Tensor]]:
    """Sum of each member's losses over its samples, and its weights at the end, both on the CPU."""

    def stacked(arrays: "list[npt.NDArray[Any]]") -> Tensor:
        return torch.tensor(np.stack(arrays), device=device)  # in torch's own memory, see ``torch_engine``

    def loss_of(one: dict[str, Tensor], inputs: Tensor, targets: Tensor, shares: Tensor) -> Tensor:
        losses = nn.functional.cross_entropy(functional_call(module, one, (inputs,)), targets, reduction="none")
        return (losses * shares).sum()

    gradients_of = vmap(grad_and_value(loss_of))
    weights = {name: stacked([member.state[name] for member in members]) for name in members[0].state}
    velocities = dict[str, Tensor]()
    offsets = {name: stacked([one.correction.offset[name] for one in members]) for name in members[0].correction.offset}
    mu = members[0].correction.mu
    start = {name: tensor.clone() for name, tensor in weights.items() if mu}
    longest = max(len(member.data) for member in members)
    inputs = stacked([_longer(member.data.inputs, longest) for member in members])
    targets = stacked([_longer(member.data.targets, longest) for member in members])
    plan = _batches(members, config)
    together: npt.NDArray[np.bool_] = np.all(plan[2], axis=1)
    order, shares, counts = (torch.from_numpy(array).to(device) for array in plan)
    rows = torch.arange(len(members), device=device)[:, None]
    totals = torch.zeros(len(members), dtype=torch.float64, device=device)
    for step in range(len(order)):
        batch = rows, order[step]
        gradients, losses = gradients_of(weights, inputs[batch], targets[batch], shares[step])
        totals += torch.where(counts[step] > 0, losses.double() * counts[step], 0.0)
        for name, before in weights.items():
            gradient = gradients[name]
            if mu:
                gradient = gradient + mu * (before - start[name])
            if name in offsets:
                gradient = gradient + offsets[name]
            if config.momentum:
                gradient = config.momentum * velocities[name] + gradient if name in velocities else gradient
                velocities[name] = gradient
            # Not ``sub_(gradient, alpha=lr)``: it rounds once in vectors and twice in what is left over at their end.
            move = config.lr * gradient
            if not together[step]:
                move = torch.where((counts[step] > 0).reshape(-1, *[1] * (move.dim() - 1)), move, 0.0)
            before.sub_(move)
    return totals.cpu().numpy(), {name: tensor.cpu() for name, tensor in weights.items()}


def _longer(array: npt.NDArray[Any], length: int) -> npt.NDArray[Any]:
    return np.pad(array, ((0, length - len(array)), *[(0, 0)] * (array.ndim - 1)))


def _batches(
    members: list[_Member], config: ClientConfig
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Samples ``(S, W, B)`` of every step, their shares in its mean loss, and how many there are, ``(S, W)``."""
    size = config.batch_size
    most = max(num_steps(len(member.data), size, config.epochs) for member in members)
    order = np.zeros((most, len(members), size), np.int64)
    shares, counts = np.zeros(order.shape, np.float32), np.zeros(order.shape[:2], np.int64)
    for w, member in enumerate(members):
        rng, step = np.random.default_rng(member.seed), 0
        for _ in range(config.epochs):
            shuffled = rng.permutation(len(member.data))
            for first in range(0, len(shuffled), size):
                batch = shuffled[first : first + size]
                order[step, w, : len(batch)], shares[step, w, : len(batch)] = batch, 1 / len(batch)
                counts[step, w] = len(batch)
                step += 1
    return order, shares, counts


# Layers of a stack ------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def _stackable(model: ModelConfig) -> nn.Module:
    """The model with layers that treat all places of a stack alike."""
    module = copy.deepcopy(blank_module(model)).train()
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = _Linear
    return module


class _Linear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        rows = input.reshape(-1, self.in_features)
        result = _product(rows, self.weight.mT)
        if self.bias is not None:  # as a product too: its gradient is a sum over the batch
            result = result + _product(torch.ones_like(rows[:, :1]), self.bias[None])
        return result.reshape(*input.shape[:-1], self.out_features)


def _product(a: Tensor, b: Tensor) -> Tensor:
    result: Tensor = _Product.apply(a, b)  # type: ignore[no-untyped-call]
    return result


class _Product(torch.autograd.Function):
    """``a @ b``. In a stack all matrices lie alike; see Note [stacks]."""

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        return a @ b

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (a, b), (of_a, of_b) = ctx.saved_tensors, ctx.needs_input_grad
        return _product(gradient, b.mT) if of_a else None, _product(a.mT, gradient) if of_b else None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, int | None], a: Tensor, b: Tensor) -> tuple[Tensor, int]:
        lefts, rights = (
            _alike(one.expand(info.batch_size, *one.shape) if dim is None else one.movedim(dim, 0))
            for one, dim in zip((a, b), in_dims, strict=True)
        )
        return torch.bmm(lefts, rights, out=_room(lefts, lefts.shape[1], rights.shape[2])), 0


def _alike(matrices: Tensor) -> Tensor:
    """The same matrices, each from the start of a cache line."""
    if 1 in matrices.stride()[1:] and matrices.stride(0) % _LANES == 0 and matrices.data_ptr() % (4 * _LANES) == 0:
        return matrices
    return _room(matrices, *matrices.shape[1:]).copy_(matrices)


def _room(like: Tensor, height: int, width: int) -> Tensor:
    """Uninitialized matrices, as many as there are in ``like``."""
    return like.new_empty(len(like), height, -(-width // _LANES) * _LANES)[..., :width]

"""The ``torch`` engine: one client after the other, eager PyTorch on the CPU."""

import math

import numpy as np
import torch
from torch import Tensor, nn

from efftrain.data import ArrayDataset
from efftrain.errors import ConfigError, NonFiniteError
from efftrain.federated.engines import Correction, Measured, State, Trained
from efftrain.federated.engines.modules import fresh_state, loaded_module, state_of, torch_threads
from efftrain.federated.recipe import ClientConfig, ModelConfig

_EVALUATION_BATCH = 256
_Tensors = tuple[Tensor, ...] | list[Tensor]

# Inputs are copied into torch's own memory: NumPy's lies at any multiple of 16 bytes, and where a tensor lies decides
# the order in which some of MKL's kernels add up.


class TorchEngine:
    """See ``Engine``. One module a model and thread is kept and loaded again for every client."""

    def initial_state(self, model: ModelConfig, seed: int) -> State:
        """Fresh weights drawn with ``seed``; torch's global generator is left as it was."""
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
        """Plain SGD over ``config.epochs`` shuffles of ``data``; the last batch of an epoch may be smaller.

        Raises:
            ConfigError: ``config.scheme`` is not ``fp32``.
            NonFiniteError: The loss became inf or NaN.
        """
        check_scheme(config)
        with torch_threads(config.threads):
            module = loaded_module(model, state).train()
            step = _Step(module, config, correction)
            inputs, targets = torch.from_numpy(data.inputs), torch.from_numpy(data.targets)
            rng = np.random.default_rng(seed)
            total = 0.0
            for _ in range(config.epochs):
                for batch in torch.split(torch.from_numpy(rng.permutation(len(data))), config.batch_size):
                    loss = nn.functional.cross_entropy(module(inputs[batch]), targets[batch])
                    step(loss)
                    total += loss.item() * len(batch)
            check_finite(total, config)
            return Trained(state_of(module), total / (config.epochs * len(data)), len(data))

    def evaluate(self, model: ModelConfig, state: State, data: ArrayDataset, config: ClientConfig) -> Measured:
        """See ``Engine.evaluate``."""
        with torch_threads(config.threads), torch.no_grad():
            module = loaded_module(model, state).eval()
            right, total = 0, 0.0
            for start in range(0, len(data), _EVALUATION_BATCH):
                inputs, targets = data.batch(np.arange(start, min(start + _EVALUATION_BATCH, len(data))))
                logits, labels = module(torch.tensor(inputs)), torch.from_numpy(targets)
                right += int((logits.argmax(dim=1) == labels).sum())
                total += nn.functional.cross_entropy(logits, labels, reduction="sum").item()
            return Measured(right / len(data), total / len(data), len(data))


class _Step:
    """SGD with momentum, to the bits of ``torch.optim.SGD``, which for a handful of small tensors takes longer to get
    going than to compute."""

    def __init__(self, module: nn.Module, config: ClientConfig, correction: Correction | None) -> None:
        named = [(name, tensor) for name, tensor in module.named_parameters() if tensor.requires_grad]
        self._parameters: _Tensors = [tensor for _, tensor in named]
        self._lr, self._momentum = config.lr, config.momentum
        self._velocities: _Tensors | None = None
        self._mu = 0.0 if correction is None else correction.mu
        self._start = [tensor.detach().clone() for tensor in self._parameters] if self._mu else []
        offset = {} if correction is None else correction.offset
        nothing = torch.zeros(())
        self._offsets = [torch.tensor(offset[name]) if name in offset else nothing for name, _ in named if offset]

    def __call__(self, loss: Tensor) -> None:
        # Two gradients may be one tensor: nothing is added to them in place.
        gradients: _Tensors = torch.autograd.grad(loss, self._parameters, materialize_grads=True)
        with torch.no_grad():
            if self._mu:
                away = torch._foreach_sub(self._parameters, self._start)
                gradients = torch._foreach_add(gradients, away, alpha=self._mu)
            if self._offsets:
                gradients = torch._foreach_add(gradients, self._offsets)
            if self._momentum:
                if self._velocities is None:
                    self._velocities = [gradient.clone() for gradient in gradients]
                else:
                    torch._foreach_mul_(self._velocities, self._momentum)
                    torch._foreach_add_(self._velocities, gradients)
                gradients = self._velocities
            torch._foreach_add_(self._parameters, gradients, alpha=-self._lr)


def check_scheme(config: ClientConfig) -> None:
    """Refuse a client that is to be trained in integers.

    Raises:
        ConfigError: It says which engine does that.
    """
    if config.scheme != "fp32":
        raise ConfigError(
            f"client.scheme is {config.scheme!r}, but the {config.engine} engine trains every parameter in fp32. Set "
            'client.engine="device", or leave client.scheme at "fp32".'
        )


def check_finite(total: float, config: ClientConfig) -> None:
    """Refuse a training whose loss is no number.

    Raises:
        NonFiniteError: It is inf or NaN.
    """
    if not math.isfinite(total):
        raise NonFiniteError(f"local training diverged: the loss is {total}. Lower client.lr ({config.lr}).")

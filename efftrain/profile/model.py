"""Parameters, MACs, activations, memory and energy of a model, per layer and in total.

How memory is counted. Every figure is of tensors, in bytes of the number format asked for; integer tensors (tokens, the
indices of a max pool) keep the size they have. What an allocator, a library or a runtime adds is not in it.

- *Inference*: a tensor lives from the operator that makes it to the last one that reads it, views included; the input
  to its last use, the output to the end. The peak is the largest sum over operators. Weights are apart. Nothing is
  assumed to be fused or done in place that the model does not do in place.
- *Training*: the sum of what autograd keeps for the backward pass, each storage once, weights apart. On top of it a
  training step with plain SGD holds the weights and one gradient for each trainable one.

How energy is counted: see ``energy``. Each operator's MACs, and its reads and writes from the smallest memory that
holds them. The backward pass is counted by its own operators. The optimizer's update is not in it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

from efftrain.errors import ConfigError
from efftrain.profile.energy import ARITHMETIC, NumberFormat, check_number_format, estimate_pj, memory_level
from efftrain.profile.trace import Block, Operation, Trace, trace_inference, trace_training

MODEL_BITS = (32, 16, 8, 4)


@dataclass(frozen=True, kw_only=True)
class LayerProfile:
    """One module that computes something itself; what a container computes between its children is a row too."""

    name: str
    """Name in the model, ``"(model)"`` for what the outermost module computes itself."""
    type: str
    output_shape: tuple[int, ...]
    """Shape of its first output, with the batch; empty if it has no tensor output."""
    parameters: int
    """Its own, without those of its children. A shared parameter is counted where it appears first."""
    macs: int
    """Forward."""
    backward_macs: int
    activations: int
    """Elements that it writes in a forward pass."""
    activation_bytes: int
    saved_bytes: int
    """Kept for the backward pass."""
    moved_bytes: int
    """Read (inputs, weights) and written in a forward pass, by every operator once."""
    macs_per_byte: float
    """Arithmetic intensity of the forward pass."""
    energy_uj: float
    """Estimate for a forward pass, in microjoules."""
    training_energy_uj: float
    """Estimate for a forward and a backward pass."""


@dataclass(frozen=True, kw_only=True)
class ModelProfile:
    """A model's figures for one batch."""

    model: str
    input_shapes: tuple[tuple[int, ...], ...]
    """With the batch."""
    number_format: NumberFormat
    """What bytes and energy are counted in."""
    layers: tuple[LayerProfile, ...]
    """In the order of their first operator."""
    parameters: int
    trainable_parameters: int
    buffers: int
    """Elements of buffers, such as the running statistics of a batch norm."""
    macs: int
    """Forward."""
    backward_macs: int
    activations: int
    model_bytes: Mapping[int, int]
    """Bits per number -> size of all parameters and buffers."""
    weight_bytes: int
    """The same in ``number_format``."""
    peak_inference_bytes: int
    """Activations alive at once in a forward pass, at most; weights apart."""
    saved_for_backward_bytes: int
    """Activations kept for the backward pass; weights apart."""
    training_bytes: int
    """Weights, a gradient for each trainable one, and ``saved_for_backward_bytes``: training with plain SGD."""
    moved_bytes: int
    macs_per_byte: float
    energy_uj: float
    """Estimate for a forward pass, in microjoules."""
    training_energy_uj: float
    """Estimate for a forward and a backward pass; the optimizer's update is left out."""
    uncounted_operators: tuple[str, ...]
    """Operators that use a weight matrix and whose MACs we cannot count; empty for all shipped models."""

    def to_dict(self) -> dict[str, object]:
        """Plain values, for JSON."""
        plain = asdict(self)
        plain["model_bytes"] = {str(bits): size for bits, size in self.model_bytes.items()}
        return plain


def profile_model(
    model: nn.Module, example_input: Tensor | tuple[Tensor, ...], number_format: NumberFormat = "fp32"
) -> ModelProfile:
    """Profile a model by running it: once forward in evaluation mode, once forward and backward in training mode.

    Args:
        model: Any module, on any device. Its weights, buffers, gradients and mode are left as they were.
        example_input: Its input, batch included; figures are for that batch. Values matter only if the model looks at
            them.
        number_format: What bytes and energy are counted in, whatever the model computes in here.

    Returns:
        The profile.

    Raises:
        ConfigError: An unknown format, or the model does not run on that input.
    """
    check_number_format(number_format)
    inputs = example_input if isinstance(example_input, tuple) else (example_input,)
    try:
        inference = trace_inference(model, inputs)
        forward, backward = trace_training(model, inputs)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        shapes = ", ".join(f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in inputs)
        first_line = (str(error).splitlines() or [""])[0]
        raise ConfigError(
            f"{type(model).__name__} does not run on an input of shape {shapes} "
            f"({type(error).__name__}: {first_line}). Give the shape that it is made for."
        ) from error
    return _Counter(model, inputs, number_format, inference, forward, backward).profile()


class _Counter:
    """Adds up traces by layer."""

    def __init__(
        self,
        model: nn.Module,
        inputs: tuple[Tensor, ...],
        number_format: NumberFormat,
        inference: Trace,
        forward: Trace,
        backward: Trace,
    ) -> None:
        self.model = model
        self.inputs = inputs
        self.number_format = number_format
        self.inference = _without_unused_outputs(inference)
        self.forward = forward
        self.backward = backward
        self.number_bytes = ARITHMETIC[number_format].num_bytes

    def profile(self) -> ModelProfile:
        layers = self._layers()
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        trainable = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        buffers = sum(buffer.numel() for buffer in self.model.buffers())
        saved_bytes = sum(self._bytes(block) for _, block in self.forward.saved)
        weight_bytes = (parameters + buffers) * self.number_bytes
        macs = sum(layer.macs for layer in layers)
        moved_bytes = sum(layer.moved_bytes for layer in layers)
        return ModelProfile(
            model=type(self.model).__name__,
            input_shapes=tuple(tuple(tensor.shape) for tensor in self.inputs),
            number_format=self.number_format,
            layers=tuple(layers),
            parameters=parameters,
            trainable_parameters=trainable,
            buffers=buffers,
            macs=macs,
            backward_macs=sum(layer.backward_macs for layer in layers),
            activations=sum(layer.activations for layer in layers),
            model_bytes={bits: -(-(parameters + buffers) * bits // 8) for bits in MODEL_BITS},
            weight_bytes=weight_bytes,
            peak_inference_bytes=self._peak_inference_bytes(),
            saved_for_backward_bytes=saved_bytes,
            training_bytes=weight_bytes + trainable * self.number_bytes + saved_bytes,
            moved_bytes=moved_bytes,
            macs_per_byte=macs / moved_bytes if moved_bytes else 0.0,
            energy_uj=sum(layer.energy_uj for layer in layers),
            training_energy_uj=sum(layer.training_energy_uj for layer in layers),
            uncounted_operators=tuple(sorted(self.inference.uncounted)),
        )

    def _layers(self) -> list[LayerProfile]:
        operations = _by_layer(self.inference)
        training = _by_layer(self.forward)
        backward = _by_layer(self.backward)
        saved: dict[str, int] = defaultdict(int)
        for layer, block in self.forward.saved:
            saved[layer] += self._bytes(block)
        modules = dict(self.model.named_modules())
        parameters = _own_parameters(modules)
        # Dispatch order first, then modules that only hold parameters or work only in training (dropout).
        names = dict.fromkeys((*operations, *training, *backward, *(name for name in modules if parameters[name])))
        rows = []
        for name in names:
            row = self._layer(name, modules[name], operations[name], training[name], backward[name], saved[name])
            if parameters[name] or row["moved_bytes"] or row["backward_macs"] or row["saved_bytes"]:
                rows.append(LayerProfile(parameters=parameters[name], **row))  # type: ignore[arg-type]
        return rows

    def _layer(
        self,
        name: str,
        module: nn.Module,
        operations: list[Operation],
        training: list[Operation],
        backward: list[Operation],
        saved_bytes: int,
    ) -> dict[str, object]:
        written = [block for operation in operations if not operation.is_view for block in operation.writes]
        macs = sum(operation.macs for operation in operations)
        moved_bytes = sum(self._moved_bytes(operation) for operation in operations)
        shape = self.inference.output_shapes.get(name, ())
        return {
            "name": name or "(model)",
            "type": type(module).__name__,
            "output_shape": shape,
            "macs": macs,
            "backward_macs": sum(operation.macs for operation in backward),
            "activations": sum(block.elements for block in written),
            "activation_bytes": sum(self._bytes(block) for block in written),
            "saved_bytes": saved_bytes,
            "moved_bytes": moved_bytes,
            "macs_per_byte": macs / moved_bytes if moved_bytes else 0.0,
            "energy_uj": self._energy_uj(operations),
            "training_energy_uj": self._energy_uj(training) + self._energy_uj(backward),
        }

    def _bytes(self, block: Block) -> int:
        return block.elements * (self.number_bytes if block.is_float else block.itemsize)

    def _moved_bytes(self, operation: Operation) -> int:
        if operation.is_view:
            return 0
        return sum(self._bytes(block) for block in (*operation.reads, *operation.writes))

    def _energy_uj(self, operations: list[Operation]) -> float:
        picojoules = 0.0
        for operation in operations:
            moved_bytes = self._moved_bytes(operation)
            level = memory_level(moved_bytes)
            picojoules += estimate_pj(operation.macs, moved_bytes, self.number_format, level)
        return picojoules / 1e6

    def _peak_inference_bytes(self) -> int:
        sizes: dict[int, int] = {}
        born: dict[int, int] = {}
        dies: dict[int, int] = {}
        for storage, block in self.inference.input_storages.items():
            sizes[storage], born[storage], dies[storage] = self._bytes(block), 0, 0
        last = len(self.inference.operations) - 1
        for at, operation in enumerate(self.inference.operations):
            for block in (*operation.reads, *operation.writes):
                if block.is_state:
                    continue
                # The first time it is seen it is whole: views come later.
                sizes.setdefault(block.storage, self._bytes(block))
                born.setdefault(block.storage, at)
                dies[block.storage] = last if block.storage in self.inference.output_storages else at
        change = [0] * (last + 2)
        for storage, size in sizes.items():
            change[born[storage]] += size
            change[dies[storage] + 1] -= size
        peak = alive = 0
        for delta in change:
            alive += delta
            peak = max(peak, alive)
        return peak


def _by_layer(trace: Trace) -> dict[str, list[Operation]]:
    layers: dict[str, list[Operation]] = defaultdict(list)
    for operation in trace.operations:
        layers[operation.layer].append(operation)
    return layers


def _own_parameters(modules: Mapping[str, nn.Module]) -> dict[str, int]:
    seen: set[torch.Tensor] = set()
    counts = {}
    for name, module in modules.items():
        own = [parameter for parameter in module.parameters(recurse=False) if parameter not in seen]
        seen.update(own)
        counts[name] = sum(parameter.numel() for parameter in own)
    return counts


def _without_unused_outputs(trace: Trace) -> Trace:
    """Drop second and later outputs that no operator reads and the model does not return.

    In a forward pass without a backward one these are the indices of a max pool, the statistics of a norm: what torch
    writes for the gradient only.
    """
    used = trace.output_storages.union(block.storage for operation in trace.operations for block in operation.reads)
    operations = [
        replace(
            operation,
            writes=operation.writes[:1] + tuple(block for block in operation.writes[1:] if block.storage in used),
        )
        for operation in trace.operations
    ]
    return replace(trace, operations=operations)

"""The constants of a program as C: weights, scales, shapes, schedules. All are ``static const`` and stay in flash."""

from collections.abc import Mapping
from dataclasses import astuple

import numpy as np
import numpy.typing as npt

from efftrain.ondevice.constants import (
    AddConstants,
    ConvConstants,
    ConvShape,
    Factors,
    Layers,
    MaxPoolConstants,
    ProductConstants,
    TableConstants,
)
from efftrain.ondevice.emit.names import safe
from efftrain.ondevice.ir import (
    BiasUpdate,
    ConvInputGrad,
    RowStream,
    StepGraph,
    StepOp,
    TableGrad,
    WeightUpdate,
    inner_ops,
)
from efftrain.ondevice.state import Part, StateLayout

Initial = Mapping[tuple[Part, str], npt.NDArray[np.int64]]
_BYTES = {"int8_t": 1, "uint8_t": 1, "int16_t": 2, "int32_t": 4}


class Tables:
    """Text of all constants, and how many bytes they take.

    Args:
        graph: The step, after the passes.
        layers: Constants by layer.
        ids: The C name of each layer.
        layout: Of the trained state.
        initial: ``layout.unpack`` of the initial state.
    """

    def __init__(
        self, graph: StepGraph, layers: Layers, ids: Mapping[str, str], layout: StateLayout, initial: Initial
    ) -> None:
        self.lines: list[str] = []
        self.num_bytes = 0
        self._layout, self._initial = layout, initial
        uses: dict[str, list[StepOp]] = {name: [] for name in layers}
        for op in graph.ops:
            for inner in inner_ops(op):
                if (layer := getattr(inner, "layer", None)) is not None:
                    uses[layer].append(inner)
        for name, layer in layers.items():
            match layer:
                case ConvConstants():
                    self._conv(layer, ids[name], uses[name])
                case AddConstants():
                    self._add(layer, ids[name])
                case MaxPoolConstants():
                    self._title(name, layer.shape)
                    self._shape(ids[name], layer.shape)
                case ProductConstants():
                    self._title(name, None)
                    fields = ", ".join(str(value) for value in astuple(layer)[1:])
                    self._constant(f"static const eft_product {ids[name]}_product = {{{fields}}};", 32)
                case TableConstants():
                    self._title(name, None)
                    self._array("int8_t", f"{ids[name]}_table", layer.table)
                    if any(isinstance(op, TableGrad) for op in uses[name]):
                        self._array("int16_t", f"{ids[name]}_slope", layer.slope)
                case _:
                    pass
        streams = [op for op in graph.ops if isinstance(op, RowStream)]
        for number, stream in enumerate(streams):
            self.lines.append(f"\n/* {safe(stream.name)}: which layer computes its next row */")
            self._array("uint8_t", f"stream{number}_schedule", np.array(stream.schedule))

    def _conv(self, layer: ConvConstants, c_name: str, uses: list[StepOp]) -> None:
        s = layer.shape
        self._title(layer.name, s)
        self._shape(c_name, s)
        weight, bias = self._layout.find("weight", layer.name), self._layout.find("bias", layer.name)
        trained = weight.shape[-1] if weight else 0
        if trained < layer.master.shape[-1]:
            self._array("int8_t", f"{c_name}_frozen", layer.weight[..., trained:])
        for entry in (weight, self._layout.find("residual", layer.name)):
            if entry:
                self._array("int8_t", f"{c_name}_{entry.part}_initial", self._initial[entry.part, layer.name])
        self._array("int32_t", f"{c_name}_bias{'_initial' if bias else ''}", layer.bias)
        self._factors(f"{c_name}_out", layer.out, as_struct=layer.is_head)
        if any(isinstance(op, ConvInputGrad) for op in uses):
            self._array("int16_t", f"{c_name}_channel_scale", layer.channel_scale)
            self._constant(
                f"static const eft_input_grad {c_name}_input_grad = "
                f"{{{c_name}_channel_scale, {layer.operand_bits}, {layer.grad_shift}}};",
                12,
            )
        if any(isinstance(op, WeightUpdate) for op in uses):
            self._factors(f"{c_name}_weight_rate", layer.weight_rate)
        if any(isinstance(op, BiasUpdate) for op in uses):
            self._factors(f"{c_name}_bias_rate", layer.bias_rate)
        if not layer.is_head:
            out = f"{{{c_name}_out_multiplier, {c_name}_out_shift}}"
            values = f"{layer.y_zero_point}, {layer.minimum}, {layer.minimum + layer.masked}"
            self._constant(f"static const eft_requantize {c_name}_requantize = {{{out}, {values}}};", 20)

    def _add(self, layer: AddConstants, c_name: str) -> None:
        self._title(layer.name, None)
        values = (
            *(layer.x_zero_point, layer.x_multiplier, layer.z_zero_point, layer.z_multiplier),
            *(layer.shift, layer.zero_point, layer.minimum, layer.minimum + layer.masked),
        )
        self._constant(f"static const eft_sum {c_name}_sum = {{{', '.join(map(str, values))}}};", 32)

    def _title(self, name: str, shape: ConvShape | None) -> None:
        sizes = ""
        if shape is not None:
            s = shape
            sizes = f": {s.in_h} x {s.in_w} x {s.in_c} -> {s.out_h} x {s.out_w} x {s.out_c}"
        self.lines.append(f"\n/* {safe(name)}{sizes} */")

    def _shape(self, c_name: str, shape: ConvShape) -> None:
        self._constant(f"static const eft_conv_shape {c_name}_shape = {{{', '.join(map(str, astuple(shape)))}}};", 48)

    def _factors(self, name: str, factors: Factors, *, as_struct: bool = True) -> None:
        self._array("int32_t", f"{name}_multiplier", factors.multiplier)
        self._array("int8_t", f"{name}_shift", factors.shift)
        if as_struct:
            self._constant(f"static const eft_factors {name} = {{{name}_multiplier, {name}_shift}};", 8)

    def _array(self, c_type: str, name: str, values: npt.NDArray[np.int64]) -> None:
        flat = [str(v) for v in values.reshape(-1).tolist()]
        lines = [f"static const {c_type} {name}[{len(flat)}] = {{"]
        lines += ["    " + ", ".join(flat[i : i + 20]) + "," for i in range(0, len(flat), 20)]
        lines[-1] = lines[-1].rstrip(",")
        self._constant("\n".join([*lines, "};"]), -(-len(flat) * _BYTES[c_type] // 4) * 4)

    def _constant(self, text: str, num_bytes: int) -> None:
        self.lines.append(text)
        self.num_bytes += num_bytes

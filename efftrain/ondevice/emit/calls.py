"""One op of the step graph -> the lines of C that run it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from efftrain.ondevice.constants import (
    KEPT_BIAS_DROP,
    KEPT_WEIGHT_DROP,
    ConcatConstants,
    ConvConstants,
    Layers,
    MaxPoolConstants,
    Optimizer,
    PoolConstants,
    ProductConstants,
    layer_of,
)
from efftrain.ondevice.emit.names import safe
from efftrain.ondevice.ir import (
    AddForward,
    AverageForward,
    AverageGrad,
    BiasUpdate,
    ChannelTiles,
    ConcatForward,
    ConcatGrad,
    ConvForward,
    ConvInputGrad,
    GradientSum,
    HeadForward,
    MaxPoolForward,
    MaxPoolGrad,
    Move,
    MultiplyForward,
    MultiplyGrad,
    RowOp,
    RowStream,
    SoftmaxLoss,
    SquaredLoss,
    StepGraph,
    StepOp,
    TableForward,
    TableGrad,
    WeightUpdate,
    inner_ops,
)
from efftrain.ondevice.memory import Arena
from efftrain.ondevice.state import Part, StateLayout

_TYPES = {"s8": "int8_t", "s16": "int16_t", "s32": "int32_t", "bit": "uint8_t"}


@dataclass(frozen=True, slots=True)
class Rows:
    """Which rows of an op are computed: all of them, or the next one of a stream."""

    first: str
    count: str
    streamed: bool


class Calls:
    """The calls of a program.

    Args:
        name: The program's prefix.
        graph: The step, after the passes.
        layers: Constants by layer.
        ids: The C name of each layer.
        layout: Of the trained state.
        arena: Offsets of every buffer.
        optimizer: How steps become moves.
    """

    def __init__(
        self,
        name: str,
        graph: StepGraph,
        layers: Layers,
        ids: Mapping[str, str],
        layout: StateLayout,
        arena: Arena,
        optimizer: Optimizer,
    ) -> None:
        self._optimizer = optimizer
        self._classes = f"{name.upper()}_NUM_CLASSES"
        self._graph, self._layers, self._ids, self._layout, self._arena = graph, layers, ids, layout, arena
        counts: dict[str, int] = {}
        self._variables = {graph.input: "input"}
        for buffer in arena.buffers:
            number = counts[buffer.kind] = counts.get(buffer.kind, -1) + 1
            self._variables[buffer.name] = (
                buffer.kind if buffer.kind in ("input", "logits") else f"{buffer.kind}{number}"
            )
        self._bits_read: set[str] = set()
        for op in (inner for each in graph.ops for inner in inner_ops(each)):
            if isinstance(op, ConvInputGrad | WeightUpdate | BiasUpdate | MultiplyGrad | TableGrad):
                self._bits_read.add(op.g)
            elif isinstance(op, GradientSum):
                self._bits_read.update((op.a, op.b or op.a))
        for op in reversed(graph.ops):
            if isinstance(op, Move) and op.y in self._bits_read:
                self._bits_read.add(op.x)
        streams = [op for op in graph.ops if isinstance(op, RowStream)]
        self._stream_numbers = {op.name: number for number, op in enumerate(streams)}

    def variable(self, tensor: str) -> str:
        """The C name of a tensor."""
        return self._variables[tensor]

    def declarations(self, ops: Iterable[StepOp]) -> list[str]:
        """One line a buffer that these ops use, and the exponents and bits of the gradients that they write."""
        used = {name for op in ops for name in (*op.reads, *op.writes)}
        lines: list[str] = []
        for buffer in self._arena.buffers:
            if buffer.name in used:
                c_type = _TYPES[self._graph.tensors[buffer.name].dtype]
                lines.append(
                    f"    {c_type} *const {self._variables[buffer.name]} = ({c_type} *)((uint8_t *)context->arena + "
                    f"{buffer.offset}); /* {buffer.num_bytes} B, ops {buffer.first_op}..{buffer.last_op}, "
                    f"{safe(buffer.name)} */"
                )
        gradients = [n for op in ops for n in op.writes if self._graph.tensors[n].role in ("gradient", "tile")]
        for g in gradients:
            bits = f"{self._variables[g]}_bits, " if g in self._bits_read else ""
            lines.append(f"    int32_t {bits}{self._variables[g]}_exponent;")
        return lines

    def state(self, offset: int, c_type: str = "int8_t") -> str:
        """A pointer into the trained state."""
        return f"({c_type} *)((uint8_t *)context->state + {offset})"

    def call(self, index: int) -> list[str]:
        """The op of this number, in a block of its own."""
        op = self._graph.ops[index]
        title = f"    {{ /* op {index}: {safe(op.name)} */"
        return [title, *(f"        {line}" for line in self._lines(op)), "    }"]

    def _lines(self, op: StepOp) -> list[str]:
        v = self._variables
        match op:
            case ConvForward() | AddForward() | MaxPoolForward():
                height = self._graph.tensors[op.y].shape[0]
                return self._rows(op, Rows("0", str(height), streamed=False))
            case RowStream():
                return self._stream(op)
            case HeadForward():
                c_name = self._ids[op.layer]
                layer = self._conv(op.layer)
                start = f"{v[op.x]}, &{c_name}_shape, {layer.x_zero_point}, &weights, {self._bias(layer)}"
                return [self._weights(layer), f"eft_head_s8({start}, &{c_name}_out, {v[op.logits]});"]
            case TableForward():
                count = self._graph.tensors[op.y].num_elements
                return [f"eft_table_s8({v[op.x]}, {self._ids[op.layer]}_table, {count}, {v[op.y]});"]
            case AverageForward():
                pool = layer_of(self._layers, op.layer, PoolConstants)
                return [
                    f"eft_global_average_s8({v[op.x]}, {pool.pixels}, {pool.channels}, {pool.zero_point}, "
                    f"{pool.multiplier}, {pool.shift}, {v[op.y]});"
                ]
            case MultiplyForward():
                return [f"eft_multiply_s8({v[op.x]}, {v[op.z]}, &{self._ids[op.layer]}_product, {v[op.y]});"]
            case ConcatForward():
                concat = layer_of(self._layers, op.layer, ConcatConstants)
                calls: list[str] = []
                for number, x in enumerate(op.xs):
                    first, total = sum(concat.channels[:number]), sum(concat.channels)
                    sizes = f"{concat.pixels}, {concat.channels[number]}, {first}, {total}"
                    calls.append(f"eft_concat_s8({v[x]}, {sizes}, {v[op.y]});")
                return calls
            case SquaredLoss():
                call = f"eft_squared_loss_s16({v[op.logits]}, {v[op.target]}, {self._classes}, {v[op.g]})"
                return [self._keep_bits(op.g, call), f"{v[op.g]}_exponent = 0;"]
            case SoftmaxLoss():
                call = f"eft_softmax_loss_s16({v[op.logits]}, {self._classes}, label, {v[op.g]})"
                return [self._keep_bits(op.g, call), f"{v[op.g]}_exponent = -15;"]
            case _:
                return self._backward(op)

    def _backward(self, op: StepOp) -> list[str]:
        v = self._variables
        match op:
            case AverageGrad():
                pool = layer_of(self._layers, op.layer, PoolConstants)
                call = (
                    f"eft_global_average_grad_s16({v[op.g]}, {pool.pixels}, {pool.channels}, {self._mask(op.mask)}, "
                    f"{v[op.gx]})"
                )
                return [self._keep_bits(op.gx, call), f"{v[op.gx]}_exponent = {v[op.g]}_exponent;"]
            case ChannelTiles():
                return self._tiles(op)
            case ConvInputGrad():
                layer, c_name = self._conv(op.layer), self._ids[op.layer]
                call = (
                    f"eft_{layer.kind}_input_grad_s16({v[op.g]}, {v[op.g]}_bits, {self._shape(layer)}, &weights, "
                    f"&{c_name}_input_grad, "
                    f"{self._mask(op.mask)}, {v[op.gx]}, {v[op.scratch]})"
                )
                return [self._weights(layer), self._keep_bits(op.gx, call), self._exponent(op)]
            case MaxPoolGrad():
                pooled, c_name = layer_of(self._layers, op.layer, MaxPoolConstants), self._ids[op.layer]
                call = (
                    f"eft_max_pool_grad_s16({v[op.g]}, {v[op.x]}, &{c_name}_shape, {pooled.grad_shift}, "
                    f"{self._mask(op.mask)}, {v[op.gx]})"
                )
                exponent = f"{v[op.g]}_exponent + {pooled.grad_shift}"
                return [self._keep_bits(op.gx, call), f"{v[op.gx]}_exponent = {exponent};"]
            case TableGrad():
                count = self._graph.tensors[op.gx].num_elements
                call = (
                    f"eft_table_grad_s16({v[op.g]}, {v[op.g]}_bits, {v[op.x]}, {self._ids[op.layer]}_slope, {count}, "
                    f"{self._mask(op.mask)}, {v[op.gx]})"
                )
                exponent = f"{v[op.g]}_exponent + {v[op.g]}_bits - 15"
                return [self._keep_bits(op.gx, call), f"{v[op.gx]}_exponent = {exponent};"]
            case MultiplyGrad():
                return self._multiply_grad(op)
            case ConcatGrad():
                concat = layer_of(self._layers, op.layer, ConcatConstants)
                sizes = f"{concat.pixels}, {self._graph.tensors[op.gx].shape[2]}, {op.first}, {sum(concat.channels)}"
                call = f"eft_concat_grad_s16({v[op.g]}, {sizes}, {self._mask(op.mask)}, {v[op.gx]})"
                return [self._keep_bits(op.gx, call), f"{v[op.gx]}_exponent = {v[op.g]}_exponent;"]
            case GradientSum():
                count = self._graph.tensors[op.g].num_elements
                b = [self._view("b", op.b)] if op.b else []
                call = (
                    f"eft_gradient_sum_s16(&a, {'&b' if op.b else 'NULL'}, {op.multiplier}, {op.shift}, {count}, "
                    f"{self._mask(op.mask)}, {v[op.g]}, &exponent)"
                )
                return [
                    self._view("a", op.a),
                    *b,
                    "int32_t exponent;",
                    self._keep_bits(op.g, call),
                    f"{v[op.g]}_exponent = exponent;",
                ]
            case Move():
                call = f"eft_move({v[op.y]}, {v[op.x]}, {self._graph.tensors[op.x].num_bytes}u);"
                bits = [f"{v[op.y]}_bits = {v[op.x]}_bits;"] if op.y in self._bits_read else []
                return [call, *bits, f"{v[op.y]}_exponent = {v[op.x]}_exponent;"]
            case WeightUpdate():
                rule = self._rule("kept_weight", op.layer)
                return [self._view("gradient", op.g), rule, self._weight_update(op)]
            case BiasUpdate():
                return [self._view("gradient", op.g), self._rule("kept_bias", op.layer), self._bias_update(op)]
            case _:
                raise AssertionError(f"{op.name} has no C")

    def _multiply_grad(self, op: MultiplyGrad) -> list[str]:
        product, v = layer_of(self._layers, op.layer, ProductConstants), self._variables
        forward = next(f for f in self._graph.ops if isinstance(f, MultiplyForward) and f.layer == op.layer)
        zero_point = product.z_zero_point if op.other == forward.z else product.x_zero_point
        if op.scratch is None:
            pixels = product.z_pixels if op.other == forward.z else product.pixels
            call = (
                f"eft_multiply_grad_s16({v[op.g]}, {v[op.g]}_bits, {v[op.other]}, {zero_point}, {pixels}, "
                f"{product.pixels}, {product.channels}, {self._mask(op.mask)}, {v[op.gx]})"
            )
            shift = f"({v[op.g]}_bits > 7 ? {v[op.g]}_bits - 7 : 0)"
            return [self._keep_bits(op.gx, call), f"{v[op.gx]}_exponent = {v[op.g]}_exponent + {shift};"]
        call = (
            f"eft_multiply_factor_grad_s16(&gradient, {v[op.other]}, {zero_point}, {product.pixels}, "
            f"{product.channels}, {self._mask(op.mask)}, {v[op.gx]}, &exponent, {v[op.scratch]})"
        )
        return [
            self._view("gradient", op.g),
            "int32_t exponent;",
            self._keep_bits(op.gx, call),
            f"{v[op.gx]}_exponent = exponent;",
        ]

    # --- rows ---------------------------------------------------------------------------------------------------------

    def _rows(self, op: RowOp, rows: Rows) -> list[str]:
        """Compute rows of an op; the pointers start at the right row of a ring or of a whole tensor."""
        x, y, mask = self._at(op.x, rows, read=True, op=op), self._at(op.y, rows), self._mask(getattr(op, "mask", None))
        if isinstance(op, AddForward):
            assert not (rows.streamed and op.mask), "a mask of an addition starts at its first byte"
            shape = self._graph.tensors[op.y].shape
            count = shape[1] * shape[2] * (1 if rows.streamed else shape[0])
            z = self._at(op.z, rows, read=True, op=op)
            return [f"eft_add_s8({x}, {z}, &{self._ids[op.layer]}_sum, {count}, {y}, {mask});"]
        c_name = self._ids[op.layer]
        line = f"const eft_rows rows = {{{rows.first}, {rows.count}, {self._graph.tensors[op.x].shape[0]}}};"
        if isinstance(op, MaxPoolForward):
            return [line, f"eft_max_pool_s8({x}, &{c_name}_shape, &rows, {y});"]
        layer = self._conv(op.layer)
        moved = [] if rows.streamed else self._moved_bias(op)
        call = (
            f"eft_{layer.kind}_s8({x}, {self._shape(layer)}, {layer.x_zero_point}, &weights, "
            f"{self._bias(layer, op.bias)}, "
            f"&{c_name}_requantize, &rows, {y}, {mask});"
        )
        return [self._weights(layer), line, *moved, call]

    def _at(self, tensor: str, rows: Rows, *, read: bool = False, op: RowOp | None = None) -> str:
        variable = self._variables[tensor]
        if not rows.streamed or (read and not isinstance(op, AddForward)):
            return variable
        height, width, channels = self._graph.tensors[tensor].shape
        return f"{variable} + {rows.first} % {height} * {width * channels}"

    def _stream(self, stream: RowStream) -> list[str]:
        schedule = f"stream{self._stream_numbers[stream.name]}_schedule"
        lines = [
            *(line for op in stream.ops for line in self._moved_bias(op)),
            f"int32_t next[{len(stream.ops)}] = {{0}};",
            f"for (uint32_t i = 0u; i < {len(stream.schedule)}u; i++) {{",
            f"    const int32_t row = next[{schedule}[i]]++;",
            f"    switch ({schedule}[i]) {{",
        ]
        for number, op in enumerate(stream.ops):
            label = "default" if number == len(stream.ops) - 1 else f"case {number}"
            lines.append(f"    {label}: {{ /* {safe(op.name)} */")
            lines += [f"        {line}" for line in self._rows(op, Rows("row", "1", streamed=True))]
            lines += ["        break;", "    }"]
        return [*lines, "    }", "}"]

    # --- tiles --------------------------------------------------------------------------------------------------------

    def _tiles(self, op: ChannelTiles) -> list[str]:
        """Rounds over the tiles, in each of which one gradient more is taken than in the one before."""
        v, (*before, last) = self._variables, op.gradients
        width, whole = self._graph.tensors[last.g].shape[2], self._conv(last.layer).shape.out_c
        size = self._graph.tensors[last.gx].num_elements
        count = str(width) if whole % width == 0 else f"{whole} - first < {width} ? {whole} - first : {width}"
        inside: list[str] = []
        for number, gradient in enumerate(before):
            inside += [f"{{ /* {safe(gradient.name)} */", *_indented(self._tile_grad(gradient)), "}"]
            inside += [f"if (round == {number}) {{", "    continue;", "}"]
        inside += [f"{{ /* {safe(last.name)} */", *_indented(self._tile_sums(last)), "}"]
        for update in op.updates:
            inside += [f"{{ /* {safe(update.name)} */", *_indented(self._tile_update(update)), "}"]
        store = f"eft_store_sums_s16({v[last.scratch]}, {size}, {self._conv(last.layer).grad_shift}, "
        return [
            *(f"{v[tile]}_bits = {v[tile]}_exponent = 0;" for tile in op.tiles),
            f"for (uint32_t i = 0u; i < {size}u; i++) {{",
            f"    {v[last.scratch]}[i] = 0;",
            "}",
            f"for (int32_t round = 0; round < {len(op.gradients)}; round++) {{",
            f"    for (int32_t first = 0; first < {whole}; first += {width}) {{",
            f"        const eft_channels tile = {{first, {count}}};",
            *_indented(_indented(inside)),
            "    }",
            "}",
            self._keep_bits(last.gx, f"{store}{self._mask(last.mask)}, {v[last.gx]})"),
            self._exponent(last),
        ]

    def _tile_grad(self, op: ConvInputGrad) -> list[str]:
        """One tile, whose bits count if they are the most so far."""
        layer, c_name, v = self._conv(op.layer), self._ids[op.layer], self._variables
        g = f"{v[op.g]}, "
        if layer.depthwise:
            whole = self._graph.tensors[op.g].role != "tile"
            g = f"{v[op.g]} + tile.first, {layer.shape.in_c}, " if whole else f"{g}tile.count, "
        return [
            self._weights(layer),
            f"const int32_t bits = eft_{layer.kind}_input_grad_tile_s16({g}{v[op.g]}_bits, &{c_name}_shape, &weights, "
            f"&{c_name}_input_grad, {self._mask(op.mask)}, &tile, {v[op.gx]}, {v[op.scratch]});",
            f"{v[op.gx]}_bits = bits > {v[op.gx]}_bits ? bits : {v[op.gx]}_bits;",
            self._exponent(op),
        ]

    def _tile_sums(self, op: ConvInputGrad) -> list[str]:
        """What one tile of a dense layer's output sends back: a layer of its own, of fewer output channels."""
        layer, c_name, v = self._conv(op.layer), self._ids[op.layer], self._variables
        scale = f"{c_name}_input_grad.channel_scale + tile.first"
        return [
            self._tile_shape(layer),
            self._weights(layer, tiled=True),
            f"const eft_input_grad constants = {{{scale}, {layer.operand_bits}, {layer.grad_shift}}};",
            f"eft_conv_input_sums_s32({v[op.g]}, {v[op.g]}_bits, &shape, &weights, &constants, {v[op.scratch]});",
        ]

    def _tile_update(self, op: BiasUpdate | WeightUpdate) -> list[str]:
        """An update from one tile: parameters begin at its first channel."""
        layer = self._conv(op.layer)
        part = "bias" if isinstance(op, BiasUpdate) else "weight"
        rate = f"{self._ids[op.layer]}_{part}_rate"
        lines = [
            self._view("gradient", op.g),
            f"const eft_factors rate = {{{rate}.multiplier + tile.first, {rate}.shift + tile.first}};",
        ]
        if isinstance(op, BiasUpdate):
            return [*lines, self._rule("kept_bias", op.layer, 1), self._bias_update(op, tiled=True)]
        rule = self._rule("kept_weight", op.layer, self._channel_weights(layer))
        lines += [self._tile_shape(layer), rule, self._weight_update(op, tiled=True)]
        if layer.depthwise:
            return [f"if (tile.first < {self._trained(layer)}) {{", *_indented(lines), "}"]
        return lines

    def _tile_shape(self, layer: ConvConstants) -> str:
        return f"eft_conv_shape shape = {self._ids[layer.name]}_shape; shape.out_c = tile.count;"

    def _channel_weights(self, layer: ConvConstants) -> int:
        """From the first trained weight of an output channel to that of the next."""
        return 1 if layer.depthwise else layer.shape.taps * self._trained(layer)

    def _trained(self, layer: ConvConstants) -> int:
        """Trained input channels."""
        entry = self._layout.find("weight", layer.name)
        return entry.shape[-1] if entry else 0

    # --- parts of a call ----------------------------------------------------------------------------------------------

    def _mask(self, mask: str | None) -> str:
        return self._variables[mask] if mask else "NULL"

    def _keep_bits(self, gradient: str, call: str) -> str:
        keep = f"{self._variables[gradient]}_bits =" if gradient in self._bits_read else "(void)"
        return f"{keep} {call};"

    def _view(self, name: str, gradient: str) -> str:
        g = self._variables[gradient]
        return f"const eft_gradient {name} = {{{g}, {g}_bits, {g}_exponent}};"

    def _shape(self, layer: ConvConstants) -> str:
        groups = f", {layer.groups}" if layer.kind == "grouped" else ""
        return f"&{self._ids[layer.name]}_shape{groups}"

    def _exponent(self, op: ConvInputGrad) -> str:
        layer, g = self._conv(op.layer), self._variables[op.g]
        value = f"{g}_exponent - ({layer.operand_bits} - {g}_bits) + ({layer.grad_shift})"
        return f"{self._variables[op.gx]}_exponent = {value};"

    def _weights(self, layer: ConvConstants, *, tiled: bool = False) -> str:
        entry, trained = self._layout.find("weight", layer.name), self._trained(layer)
        rest = layer.master.shape[-1] - trained
        frozen = f"{self._ids[layer.name]}_frozen" if rest else "NULL"
        state = self.state(entry.offset, "const int8_t") if entry else "NULL"
        if tiled:
            taps = layer.shape.taps
            state, frozen = _from(state, taps * trained), _from(frozen, taps * rest)
        return f"const eft_weights weights = {{{state}, {frozen}, {trained}}};"

    def _moved_bias(self, op: RowOp) -> list[str]:
        """Put the biases of a layer together, if the state holds only how far they have moved."""
        if not isinstance(op, ConvForward) or op.bias is None:
            return []
        entry, c_name = self._layout.find("moved_bias", op.layer), self._ids[op.layer]
        assert entry is not None, f"{op.layer} has no moved bias"
        constants = f"{c_name}_bias, {self.state(entry.offset, 'const int16_t')}, {c_name}_out_shift"
        return [f"eft_moved_bias_s32({constants}, {entry.shape[0]}, {self._variables[op.bias]});"]

    def _bias(self, layer: ConvConstants, moved: str | None = None) -> str:
        if moved is not None:
            return self._variables[moved]
        entry = self._layout.find("bias", layer.name)
        return self.state(entry.offset, "const int32_t") if entry else f"{self._ids[layer.name]}_bias"

    def _rule(self, part: Part, layer: str, step: int = 0) -> str:
        entry, rule = self._layout.find(part, layer), self._optimizer
        kept = _from(self.state(entry.offset, "int32_t"), step) if entry else "NULL"
        last = f"((context->state[0] + 1u) & {rule.batch - 1}u) == 0u" if rule.batch > 1 else "0"
        drop = KEPT_BIAS_DROP if part == "kept_bias" else KEPT_WEIGHT_DROP
        values = f"context->lr_shift, {kept}, {drop}, {rule.decay}, {rule.batch_shift}, {last}"
        return f"const eft_optimizer optimizer = {{{values}}};"

    def _bias_update(self, op: BiasUpdate, *, tiled: bool = False) -> str:
        layer, c_name = self._conv(op.layer), self._ids[op.layer]
        bias, moved = self._layout.find("bias", op.layer), self._layout.find("moved_bias", op.layer)
        channels, rate, step = ("tile.count", "rate", 1) if tiled else (layer.shape.out_c, f"{c_name}_bias_rate", 0)
        start = f"&gradient, {layer.shape.pixels}, {channels}, &{rate}, &optimizer"
        if moved:
            shift, state = _from(f"{c_name}_out_shift", step), _from(self.state(moved.offset, "int16_t"), step)
            return f"eft_moved_bias_update_s16({start}, {shift}, {state});"
        assert bias is not None, f"{op.layer} has no trained bias"
        return f"eft_bias_update_s32({start}, {_from(self.state(bias.offset, 'int32_t'), step)});"

    def _weight_update(self, op: WeightUpdate, *, tiled: bool = False) -> str:
        layer, c_name, x = self._conv(op.layer), self._ids[op.layer], self._variables[op.x]
        weight, residual = self._layout.find("weight", op.layer), self._layout.find("residual", op.layer)
        assert weight is not None, f"{op.layer} has no trained weights"
        kernel, shape, rate, step = layer.kind, self._shape(layer), f"{c_name}_weight_rate", 0
        index, end = f"{layer.first_index}u", [str(weight.shape[-1])]
        if tiled:
            shape, rate, step = "&shape", "rate", self._channel_weights(layer)
            index += f" + (uint32_t)tile.first * {1 if layer.depthwise else layer.shape.taps * layer.shape.in_c}u"
        tile = ""
        if tiled and layer.depthwise:
            x, tile, left = _from(x, 1), "_tile", f"{weight.shape[-1]} - tile.first"
            end.append(f"{left} < tile.count ? {left} : tile.count")
        if op.scratch:
            end.append(self._variables[op.scratch])
        start = f"{x}, {layer.x_zero_point}, &gradient, {shape}, &{rate}, &optimizer"
        trained = _from(self.state(weight.offset), step)
        if residual:
            trained += f", {_from(self.state(residual.offset), step)}"
            return f"eft_{kernel}_update_master{tile}_s8({start}, {trained}, {', '.join(end)});"
        key = "eft_step_key(context->seed, context->state[0])"
        return f"eft_{kernel}_update_stochastic{tile}_s8({start}, {key}, {index}, {trained}, {', '.join(end)});"

    def _conv(self, name: str) -> ConvConstants:
        return layer_of(self._layers, name, ConvConstants)


def _from(pointer: str, step: int) -> str:
    """A pointer to what belongs to the first channel of a tile, each of which has so many elements; 0: the pointer."""
    return f"{pointer} + tile.first * {step}" if step and pointer != "NULL" else pointer


def _indented(lines: Iterable[str]) -> list[str]:
    return [f"    {line}" for line in lines]

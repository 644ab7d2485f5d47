"""``model.h`` and ``model.c``: one program as readable C99.

Identifiers are made of roles and counters. The user's own names appear in comments only, and only with characters that
cannot end one.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from efftrain.errors import ConfigError
from efftrain.ondevice.ir import (
    AverageForward,
    AverageGrad,
    BiasUpdate,
    ConvForward,
    ConvInputGrad,
    HeadForward,
    SoftmaxLoss,
    StepGraph,
    StepOp,
    WeightUpdate,
)
from efftrain.ondevice.memory import Arena, Buffer
from efftrain.ondevice.quantize import ConvConstants, ConvShape, Factors, Layers, PoolConstants
from efftrain.ondevice.state import Part, Rounding, StateLayout

_TYPES = {"s8": "int8_t", "s16": "int16_t", "s32": "int32_t", "bit": "uint8_t"}
_KEYWORDS = frozenset(
    re.findall(
        r"\w+",
        "auto break case char const continue default do double else enum extern float for goto if inline int long "
        "register restrict return short signed sizeof static struct switch typedef union unsigned void volatile while "
        "main startup driver eft",
    )
)


@dataclass(frozen=True, slots=True)
class CSource:
    """The generated files, and how many bytes of constants they put into flash."""

    header: str
    source: str
    constant_bytes: int


def check_identifier(name: str) -> str:
    """A prefix for the functions of a program.

    Raises:
        ConfigError: It is not an identifier of C, or one that C or the runtime already uses.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,30}", name) or name in _KEYWORDS or name.startswith("eft_"):
        raise ConfigError(
            f"program name {safe(name)!r} cannot be a C prefix; use lower-case letters, digits and _, at most "
            f"31, no keyword"
        )
    return name


def safe(name: str) -> str:
    """A name that may stand in a comment or a message: letters, digits, ``.``, ``_``, ``#``, ``-``; at most 60 "
    "characters."""
    return re.sub(r"[^A-Za-z0-9._#-]", "_", name)[:60]


def emit_c(
    name: str,
    graph: StepGraph,
    layers: Layers,
    layout: StateLayout,
    arena: Arena,
    rounding: Rounding,
    initial: Mapping[tuple[Part, str], npt.NDArray[np.int64]],
) -> CSource:
    """Write one program.

    Args:
        name: A checked identifier, the prefix of every public name.
        graph: The step, after the passes.
        layers: Constants by layer.
        layout: Of the trained state.
        arena: Offsets of every buffer.
        rounding: Which update kernel.
        initial: ``layout.unpack`` of the initial state.
    """
    return _Emitter(name, graph, layers, layout, arena, rounding, initial).run()


class _Emitter:
    def __init__(
        self,
        name: str,
        graph: StepGraph,
        layers: Layers,
        layout: StateLayout,
        arena: Arena,
        rounding: Rounding,
        initial: Mapping[tuple[Part, str], npt.NDArray[np.int64]],
    ) -> None:
        self.name, self.graph, self.layers, self.layout = check_identifier(name), graph, layers, layout
        self.arena, self.rounding, self.initial = arena, rounding, initial
        self.constants: list[str] = []
        self.constant_bytes = 0
        self.ids = {layer: f"layer{index}" for index, layer in enumerate(layers)}
        counts: dict[str, int] = {}
        self.variables: dict[str, str] = {}
        for buffer in arena.buffers:
            number = counts[buffer.kind] = counts.get(buffer.kind, -1) + 1
            self.variables[buffer.name] = (
                buffer.kind if buffer.kind in ("input", "logits") else f"{buffer.kind}{number}"
            )
        self.predict = [op for op in graph.ops if isinstance(op, ConvForward | HeadForward | AverageForward)]
        self.learn = [op for op in graph.ops if op not in self.predict]

    def run(self) -> CSource:
        for layer in self.layers.values():
            if isinstance(layer, ConvConstants):
                self._conv_constants(layer)
        return CSource(self._header(), self._source(), self.constant_bytes)

    # --- constants ----------------------------------------------------------------------------------------------------

    def _conv_constants(self, layer: ConvConstants) -> None:
        c_name = self.ids[layer.name]
        ops = [op for op in self.graph.ops if getattr(op, "layer", None) == layer.name]
        s = layer.shape
        self.constants.append(
            f"\n/* {safe(layer.name)}: {s.in_h} x {s.in_w} x {s.in_c} -> {s.out_h} x {s.out_w} x {s.out_c} */"
        )
        fields = ", ".join(str(getattr(s, field)) for field in ConvShape.__dataclass_fields__)
        self._constant(f"static const eft_conv_shape {c_name}_shape = {{{fields}}};", 48)
        weight, bias = self.layout.find("weight", layer.name), self.layout.find("bias", layer.name)
        trained = weight.shape[-1] if weight else 0
        if trained < s.in_c:
            self._array("int8_t", f"{c_name}_frozen", layer.weight[..., trained:])
        for entry in (weight, self.layout.find("residual", layer.name)):
            if entry:
                self._array("int8_t", f"{c_name}_{entry.part}_initial", self.initial[entry.part, layer.name])
        self._array("int32_t", f"{c_name}_bias{'_initial' if bias else ''}", layer.bias)
        self._factors(f"{c_name}_out", layer.out, as_struct=layer.is_head)
        if any(isinstance(op, ConvInputGrad) for op in ops):
            self._array("int16_t", f"{c_name}_channel_scale", layer.channel_scale)
            self._constant(
                f"static const eft_input_grad {c_name}_input_grad = "
                f"{{{c_name}_channel_scale, {layer.operand_bits}, {layer.grad_shift}}};",
                12,
            )
        if any(isinstance(op, WeightUpdate) for op in ops):
            self._factors(f"{c_name}_weight_rate", layer.weight_rate)
        if any(isinstance(op, BiasUpdate) for op in ops):
            self._factors(f"{c_name}_bias_rate", layer.bias_rate)
        if not layer.is_head:
            out = f"{{{c_name}_out_multiplier, {c_name}_out_shift}}"
            minimum = -127 if layer.y_zero_point else -128
            self._constant(
                f"static const eft_requantize {c_name}_requantize = {{{out}, {layer.y_zero_point}, {minimum}}};", 16
            )

    def _factors(self, name: str, factors: Factors, *, as_struct: bool = True) -> None:
        self._array("int32_t", f"{name}_multiplier", factors.multiplier)
        self._array("int16_t", f"{name}_shift", factors.shift)
        if as_struct:
            self._constant(f"static const eft_factors {name} = {{{name}_multiplier, {name}_shift}};", 8)

    def _array(self, c_type: str, name: str, values: npt.NDArray[np.int64]) -> None:
        flat = [str(v) for v in values.reshape(-1).tolist()]
        lines = [f"static const {c_type} {name}[{len(flat)}] = {{"]
        lines += ["    " + ", ".join(flat[i : i + 20]) + "," for i in range(0, len(flat), 20)]
        lines[-1] = lines[-1].rstrip(",")
        size = {"int8_t": 1, "int16_t": 2, "int32_t": 4}[c_type]
        self._constant("\n".join([*lines, "};"]), -(-len(flat) * size // 4) * 4)

    def _constant(self, text: str, num_bytes: int) -> None:
        self.constants.append(text)
        self.constant_bytes += num_bytes

    # --- files --------------------------------------------------------------------------------------------------------

    def _header(self) -> str:
        n, upper = self.name, self.name.upper()
        height, width, channels = self.graph.tensors[self.graph.input].shape
        classes = self.graph.tensors[self.graph.logits].num_elements
        return f"""\
/**
 * A model that trains. Generated by efftrain; the arithmetic is docs/formats/arithmetic.md.
 *
 * All RAM is in the context, which the caller owns. No function allocates, recurses, prints or uses floating point.
 */
#ifndef {upper}_H
#define {upper}_H

#include "eft.h"

#define {upper}_INPUT_BYTES {height * width * channels}u /**< int8, [{height}][{width}][{channels}], channel last */
#define {upper}_NUM_CLASSES {classes}
#define {upper}_STATE_BYTES {self.layout.num_bytes}u
#define {upper}_ARENA_BYTES {self.arena.num_bytes}u

/** Everything that the model keeps. Treat it as opaque. */
typedef struct {{
    uint32_t seed;
    int32_t lr_shift;
    uint32_t state[{self.layout.ram_bytes // 4}]; /**< The trained state: step, biases, weights, residuals */
    uint32_t arena[{self.arena.num_bytes // 4}]; /**< Activations and gradients of the step that is running */
}} {n}_context;

/** The weights as they were compiled, step 0, full learning rate. Returns EFT_OK or EFT_ERROR_ARGUMENT. */
int32_t {n}_init({n}_context *context, uint32_t seed);

/** Where an input may be written in place, so that passing it copies nothing. Every call destroys what is there. */
int8_t *{n}_input({n}_context *context);

/** The class of one input, or an error below 0. */
int32_t {n}_predict({n}_context *context, const int8_t *x, uint32_t num_bytes);

/** Learn from one labeled input. Returns the class that was predicted before, or an error below 0; then nothing
 * changed. */
int32_t {n}_train_step({n}_context *context, const int8_t *x, uint32_t num_bytes, int32_t label);

/** Halve the learning rate this many times, in [0, 31], counted from the compiled one. */
int32_t {n}_set_lr_shift({n}_context *context, int32_t lr_shift);

/** {upper}_STATE_BYTES bytes that are all the model has learned; NULL for a NULL context. */
const uint8_t *{n}_state(const {n}_context *context);

/** Take over a saved state. Refused, with nothing changed, if its length or a value cannot be of this model. */
int32_t {n}_load_state({n}_context *context, const uint8_t *state, uint32_t num_bytes);

/** sizeof({n}_context), for callers that are not C. */
uint32_t {n}_context_bytes(void);

#endif
"""

    def _source(self) -> str:
        n, upper = self.name, self.name.upper()
        lines = [
            f"/* {n}: generated by efftrain. Do not edit. */",
            f'#include "{n}.h"',
            "",
            "#include <stddef.h>",
            *self.constants,
            "",
            f"/* The arena: {self.arena.num_bytes} B; at most {self.arena.lower_bound_bytes} B are alive at once. */",
            f"static int32_t forward({n}_context *context)",
            "{",
            *self._buffers(self.predict),
            *(line for op in self.predict for line in self._call(op)),
            f"    return eft_argmax_s16({self.variables[self.graph.logits]}, {upper}_NUM_CLASSES);",
            "}",
            "",
            *self._backward(),
            f"""\
static int32_t check({n}_context *context, const int8_t *x, uint32_t num_bytes)
{{
    if (context == NULL || x == NULL) {{
        return EFT_ERROR_ARGUMENT;
    }}
    if (num_bytes != {upper}_INPUT_BYTES) {{
        return EFT_ERROR_SIZE;
    }}
    if (x != {n}_input(context)) {{
        eft_copy({n}_input(context), x, {upper}_INPUT_BYTES);
    }}
    return EFT_OK;
}}

int32_t {n}_init({n}_context *context, uint32_t seed)
{{
    if (context == NULL) {{
        return EFT_ERROR_ARGUMENT;
    }}
    context->seed = seed;
    context->lr_shift = 0;
    context->state[0] = 0U;""",
            *self._initial(),
            f"""\
    return EFT_OK;
}}

int8_t *{n}_input({n}_context *context)
{{
    return context == NULL ? NULL : (int8_t *)context->arena + {self._buffer(self.graph.input).offset};
}}

int32_t {n}_predict({n}_context *context, const int8_t *x, uint32_t num_bytes)
{{
    const int32_t status = check(context, x, num_bytes);
    return status == EFT_OK ? forward(context) : status;
}}

int32_t {n}_train_step({n}_context *context, const int8_t *x, uint32_t num_bytes, int32_t label)
{{
    int32_t result;
    if (label < 0 || label >= {upper}_NUM_CLASSES) {{
        return EFT_ERROR_LABEL;
    }}
    result = check(context, x, num_bytes);
    if (result == EFT_OK) {{
        result = forward(context);""",
            *(["        backward(context, label);"] if self.learn else []),
            f"""\
        context->state[0]++;
    }}
    return result;
}}

int32_t {n}_set_lr_shift({n}_context *context, int32_t lr_shift)
{{
    if (context == NULL || lr_shift < 0 || lr_shift > 31) {{
        return EFT_ERROR_ARGUMENT;
    }}
    context->lr_shift = lr_shift;
    return EFT_OK;
}}

const uint8_t *{n}_state(const {n}_context *context)
{{
    return context == NULL ? NULL : (const uint8_t *)context->state;
}}

int32_t {n}_load_state({n}_context *context, const uint8_t *state, uint32_t num_bytes)
{{
    if (context == NULL || state == NULL) {{
        return EFT_ERROR_ARGUMENT;
    }}
    if (num_bytes != {upper}_STATE_BYTES) {{
        return EFT_ERROR_SIZE;
    }}""",
            *self._state_checks(),
            f"""\
    eft_copy(context->state, state, num_bytes);
    return EFT_OK;
}}

uint32_t {n}_context_bytes(void)
{{
    return (uint32_t)sizeof({n}_context);
}}
""",
        ]
        return "\n".join(lines)

    def _backward(self) -> list[str]:
        if not self.learn:
            return []
        gradients = [self.variables[name] for op in self.learn for name in op.writes if self._role(name) == "gradient"]
        body: list[str] = []
        for variable in gradients:
            body.append(f"    eft_gradient {variable}_view = {{{variable}, 0, -15}};")
        body += [line for op in self.learn for line in self._call(op)]
        return [
            f"static void backward({self.name}_context *context, int32_t label)",
            "{",
            *self._buffers(self.learn),
            *body,
            "}",
            "",
        ]

    def _state_checks(self) -> list[str]:
        biases = [entry for entry in self.layout.entries if entry.part == "bias"]
        weights = [entry for entry in self.layout.entries if entry.part == "weight"]
        lines: list[str] = []
        if biases:
            end = biases[-1].offset + biases[-1].num_bytes
            lines += [
                f"    for (uint32_t i = {biases[0].offset}u; i < {end}u; i += 4u) {{",
                "        int32_t bias;",
                "        eft_copy(&bias, state + i, 4u);",
                "        if (bias < -EFT_BIAS_LIMIT || bias > EFT_BIAS_LIMIT) {",
                "            return EFT_ERROR_STATE;",
                "        }",
                "    }",
            ]
        if weights:
            end = weights[-1].offset + weights[-1].num_bytes
            lines += [
                f"    for (uint32_t i = {weights[0].offset}u; i < {end}u; i++) {{",
                "        if (state[i] == 0x80u) {",
                "            return EFT_ERROR_STATE;",
                "        }",
                "    }",
            ]
        return lines

    def _initial(self) -> list[str]:
        return [
            f"    eft_copy({self._state(entry.offset)}, {self.ids[entry.layer]}_{entry.part}_initial, "
            f"{entry.num_bytes}u);"
            for entry in self.layout.entries
            if entry.part != "step"
        ]

    # --- ops ----------------------------------------------------------------------------------------------------------

    def _buffers(self, ops: Iterable[StepOp]) -> list[str]:
        used = {name for op in ops for name in (*op.reads, *op.writes)}
        lines: list[str] = []
        for buffer in self.arena.buffers:
            if buffer.name in used:
                c_type = _TYPES[self.graph.tensors[buffer.name].dtype]
                lines.append(
                    f"    {c_type} *const {self.variables[buffer.name]} = ({c_type} *)((uint8_t *)context->arena + "
                    f"{buffer.offset}); /* {buffer.num_bytes} B, ops {buffer.first_op}..{buffer.last_op}, "
                    f"{safe(buffer.name)} */"
                )
        return lines

    def _weights(self, layer: ConvConstants) -> str:
        entry = self.layout.find("weight", layer.name)
        trained = entry.shape[-1] if entry else 0
        frozen = f"{self.ids[layer.name]}_frozen" if trained < layer.shape.in_c else "NULL"
        return f"{{{self._state(entry.offset, 'const int8_t') if entry else 'NULL'}, {frozen}, {trained}}}"

    def _state(self, offset: int, c_type: str = "int8_t") -> str:
        return f"({c_type} *)((uint8_t *)context->state + {offset})"

    def _bias(self, layer: ConvConstants) -> str:
        entry = self.layout.find("bias", layer.name)
        return self._state(entry.offset, "const int32_t") if entry else f"{self.ids[layer.name]}_bias"

    def _call(self, op: StepOp) -> list[str]:
        variable = {name: self.variables[name] for name in (*op.reads, *op.writes)}
        index = self.graph.ops.index(op)
        lines = [f"    /* op {index}: {safe(op.name)} */"]
        match op:
            case ConvForward() | HeadForward():
                layer = self._conv(op.layer)
                c_name = self.ids[op.layer]
                weights = f"const eft_weights {c_name}_weights = {self._weights(layer)};"
                start = (
                    f"{variable[op.x]}, &{c_name}_shape, {layer.x_zero_point}, &{c_name}_weights, {self._bias(layer)}"
                )
                if isinstance(op, HeadForward):
                    call = f"eft_head_s8({start}, &{c_name}_out, {variable[op.logits]});"
                else:
                    mask = variable[op.mask] if op.mask else "NULL"
                    call = f"eft_conv_s8({start}, &{c_name}_requantize, {variable[op.y]}, {mask});"
                return [*lines, f"    {weights}", f"    {call}"]
            case AverageForward():
                pool = self._pool(op.layer)
                call = (
                    f"eft_global_average_s8({variable[op.x]}, {pool.pixels}, {pool.channels}, {pool.zero_point}, "
                    f"{pool.multiplier}, {pool.shift}, {variable[op.y]});"
                )
                return [*lines, f"    {call}"]
            case SoftmaxLoss():
                classes = f"{self.name.upper()}_NUM_CLASSES"
                call = f"eft_softmax_loss_s16({variable[op.logits]}, {classes}, label, {variable[op.g]});"
                return [*lines, f"    {self._keep_bits(op.g)}{call}"]
            case AverageGrad():
                pool = self._pool(op.layer)
                mask = variable[op.mask] if op.mask else "NULL"
                old, new = f"{variable[op.g]}_view", f"{variable[op.gx]}_view"
                call = (
                    f"eft_global_average_grad_s16({variable[op.g]}, {pool.pixels}, {pool.channels}, {mask}, "
                    f"{variable[op.gx]});"
                )
                return [*lines, f"    {self._keep_bits(op.gx)}{call}", f"    {new}.exponent = {old}.exponent;"]
            case ConvInputGrad():
                layer, c_name = self._conv(op.layer), self.ids[op.layer]
                mask = variable[op.mask] if op.mask else "NULL"
                old, new = f"{variable[op.g]}_view", f"{variable[op.gx]}_view"
                call = (
                    f"eft_conv_input_grad_s16({variable[op.g]}, {old}.bits, &{c_name}_shape, "
                    f"&{c_name}_weights, &{c_name}_input_grad, {mask}, {variable[op.gx]}, {variable[op.scratch]});"
                )
                exponent = f"{old}.exponent - ({layer.operand_bits} - {old}.bits) + ({layer.grad_shift})"
                return [
                    *lines,
                    f"    const eft_weights {c_name}_weights = {self._weights(layer)};",
                    f"    {self._keep_bits(op.gx)}{call}",
                    f"    {new}.exponent = {exponent};",
                ]
            case WeightUpdate():
                return [*lines, f"    {self._weight_update(op, variable)}"]
            case BiasUpdate():
                layer, c_name = self._conv(op.layer), self.ids[op.layer]
                entry = self.layout.find("bias", op.layer)
                assert entry is not None, f"{op.layer} has no trained bias"
                call = (
                    f"eft_bias_update_s32(&{variable[op.g]}_view, {layer.shape.pixels}, {layer.shape.out_c}, "
                    f"&{c_name}_bias_rate, context->lr_shift, {self._state(entry.offset, 'int32_t')});"
                )
                return [*lines, f"    {call}"]

    def _keep_bits(self, gradient: str) -> str:
        """What stands before the call that writes a gradient: its bits are kept if an op reads them."""
        readers = (op for op in self.learn if isinstance(op, ConvInputGrad | WeightUpdate | BiasUpdate))
        used = any(op.g == gradient for op in readers)
        return f"{self.variables[gradient]}_view.bits = " if used else "(void)"

    def _weight_update(self, op: WeightUpdate, variable: Mapping[str, str]) -> str:
        layer, c_name = self._conv(op.layer), self.ids[op.layer]
        weight, residual = self.layout.find("weight", op.layer), self.layout.find("residual", op.layer)
        assert weight is not None, f"{op.layer} has no trained weights"
        start = (
            f"{variable[op.x]}, {layer.x_zero_point}, &{variable[op.g]}_view, &{c_name}_shape, &{c_name}_weight_rate, "
            "context->lr_shift"
        )
        end = f"{weight.shape[-1]}, {variable[op.scratch]}"
        if residual:
            planes = f"{self._state(weight.offset)}, {self._state(residual.offset)}"
            return f"eft_conv_update_master_s8({start}, {planes}, {end});"
        key = "eft_step_key(context->seed, context->state[0])"
        return (
            f"eft_conv_update_stochastic_s8({start}, {key}, {layer.first_index}u, {self._state(weight.offset)}, {end});"
        )

    def _conv(self, name: str) -> ConvConstants:
        layer = self.layers[name]
        assert isinstance(layer, ConvConstants), f"{name} is no convolution"
        return layer

    def _pool(self, name: str) -> PoolConstants:
        layer = self.layers[name]
        assert isinstance(layer, PoolConstants), f"{name} is no pooling"
        return layer

    def _role(self, name: str) -> str:
        return self.graph.tensors[name].role

    def _buffer(self, name: str) -> Buffer:
        return next(buffer for buffer in self.arena.buffers if buffer.name == name)

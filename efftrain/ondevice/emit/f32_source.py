"""The fp32 host profile, second half: steps and buffers -> C that trains a whole client in one call."""

import math
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

from efftrain.ondevice.emit.f32_plan import (
    LANES,
    ClampStep,
    ConvStep,
    HostPlan,
    LinearStep,
    Map,
    Parameter,
    PoolStep,
    Step,
)
from efftrain.ondevice.emit.names import safe

RUNTIME = Path(__file__).parent.parent / "runtime_f32"

_CALLS = """
/** Forward pass of the first n samples that were loaded. */
static void eft_forward(float *a, int32_t n)
{
{forward}
}

/** Backward pass and step of the first n samples; their gradients are those of the logits. */
static void eft_backward(float *a, int32_t n, float rate, float momentum)
{
{backward}
}

/** What the convolutions read their weights from, after these changed. */
static void eft_prepare(float *a)
{
{prepare}
}

static void eft_read_state(float *a, const float *const *state)
{
    memset(a + {weights}, 0, {num_weights} * sizeof *a);
{read}
    eft_prepare(a);
}

static void eft_write_state(const float *a, float *const *result)
{
{write}
}

static void eft_read_sample(float *a, int32_t b, const float *from, int64_t target)
{
{sample}
    ((int32_t *)(a + {targets}))[b] = (int32_t)target;
}

/**
 * Plain SGD on the mean loss of each batch; the last batch of an epoch may be smaller.
 *
 * @param[in,out] a        Arena of eft_arena_floats() floats, all zero before its first use, any other use before
 * @param[in]     state    The model's tensors in PyTorch's order
 * @param[out]    result   The same after training; may be state
 * @param[in]     samples  [N][{sample_floats}]
 * @param[in]     targets  [N], in [0, {classes})
 * @param[in]     order    [epochs][count], indices in [0, N)
 * @return                 Sum of the losses of all samples, each before its own step
 */
double eft_train(float *a, const float *const *state, float *const *result, const float *samples,
                 const int64_t *targets, const int64_t *order, int64_t count, int64_t epochs, float rate,
                 float momentum);
double eft_train(float *a, const float *const *state, float *const *result, const float *samples,
                 const int64_t *targets, const int64_t *order, int64_t count, int64_t epochs, float rate,
                 float momentum)
{
    double loss = 0.0;
    int64_t right = 0;
    eft_read_state(a, state);
    memset(a + {velocities}, 0, {num_weights} * sizeof *a);
    memset(a + {gradients}, 0, {num_weights} * sizeof *a);
    for (int64_t epoch = 0; epoch < epochs; epoch++) {
        for (int64_t first = 0; first < count; first += {batch}) {
            const int32_t n = (int32_t)(count - first < {batch} ? count - first : {batch});
            for (int32_t b = 0; b < n; b++) {
                const int64_t index = order[epoch * count + first + b];
                eft_read_sample(a, b, samples + index * {sample_floats}, targets[index]);
            }
            eft_forward(a, n);
            loss += eft_softmax_loss_f32(a + {logits}, {logits_next}, {classes}, (const int32_t *)(a + {targets}), n,
                                         1.0F / (float)n, a + {logits_gradient}, &right);
            eft_backward(a, n, rate, momentum);
            eft_prepare(a);
        }
    }
    eft_write_state(a, result);
    return loss;
}

/** Sum of the losses of `count` samples; as eft_train, and how many are right is added to *right. */
double eft_evaluate(float *a, const float *const *state, const float *samples, const int64_t *targets, int64_t count,
                    int64_t *right);
double eft_evaluate(float *a, const float *const *state, const float *samples, const int64_t *targets, int64_t count,
                    int64_t *right)
{
    double loss = 0.0;
    eft_read_state(a, state);
    for (int64_t first = 0; first < count; first += {batch}) {
        const int32_t n = (int32_t)(count - first < {batch} ? count - first : {batch});
        for (int32_t b = 0; b < n; b++) {
            eft_read_sample(a, b, samples + (first + b) * {sample_floats}, targets[first + b]);
        }
        eft_forward(a, n);
        loss += eft_softmax_loss_f32(a + {logits}, {logits_next}, {classes}, (const int32_t *)(a + {targets}), n, 0.0F,
                                     NULL, right);
    }
    return loss;
}

int64_t eft_arena_floats(void);
int64_t eft_arena_floats(void)
{
    return {arena};
}
"""


def host_f32_sources(plan: HostPlan) -> dict[str, str]:
    """All files of the library, by name."""
    headers = {path.name: path.read_text() for path in sorted(RUNTIME.glob("*.h"))}
    return {**headers, "client.c": _source(plan, headers)}


def _source(plan: HostPlan, headers: Iterable[str]) -> str:
    logits, first = plan.steps[-1].y, plan.input
    values = {
        "forward": _lines(line for segment in _segments(plan) for line in _forward(plan, segment)),
        "backward": _lines(line for segment in reversed(_segments(plan)) for line in _backward(plan, segment)),
        "prepare": _lines(_prepare(plan)) or "    (void)a;",
        "read": _lines(_move("eft_from_torch_f32", plan, f"state[{i}]", p) for i, p in enumerate(plan.parameters)),
        "write": _lines(_move("eft_to_torch_f32", plan, f"result[{i}]", p) for i, p in enumerate(plan.parameters)),
        "sample": _lines([_sample(first)]),
        "sample_floats": first.height * first.width * first.channels,
        "weights": plan.weights,
        "velocities": plan.velocities,
        "gradients": plan.gradients,
        "num_weights": plan.num_weights,
        "targets": plan.targets,
        "batch": plan.batch_size,
        "classes": plan.num_classes,
        "logits": logits.offset,
        "logits_next": logits.next,
        "logits_gradient": logits.gradient,
        "arena": plan.arena_floats,
    }
    calls = _CALLS
    for name, value in values.items():
        calls = calls.replace("{" + name + "}", str(value))
    includes = "".join(f'#include "{header}"\n' for header in headers)
    title = f"/* One client's training in fp32 on this machine, batches of {plan.batch_size}. */\n"
    return title + includes + calls


def _lines(lines: Iterable[str]) -> str:
    return "\n".join(f"    {line}" for line in lines)


def _segments(plan: HostPlan) -> list[list[Step]]:
    """Linear layers take the batch at once; what lies between them goes sample by sample, while it is in the cache."""
    return [list(steps) for _, steps in groupby(plan.steps, key=lambda step: isinstance(step, LinearStep))]


def _call(function: str, *arguments: object) -> str:
    return f"{function}({', '.join(map(str, arguments))});"


def _title(step: Step) -> str:
    return f"/* {safe(step.name)} */"


def _high(clamp: float | None) -> str:
    return "0, 0.0F" if clamp is None else f"1, {_bound(clamp)}"


def _bound(clamp: float) -> str:
    return "INFINITY" if math.isinf(clamp) else f"{clamp!r}F"


def _x(m: Map, inside: bool = False) -> str:
    """A map of sample ``b``, from its border or from its first element."""
    return f"a + {m.offset + (m.first if inside else 0)} + b * {m.next}"


def _dx(m: Map, inside: bool = False) -> str:
    return f"a + {m.gradient + (m.first if inside else 0)}" + (f" + b * {m.gradient_next}" if m.gradient_next else "")


# --- forward ----------------------------------------------------------------------------------------------------------


def _forward(plan: HostPlan, segment: list[Step]) -> Iterator[str]:
    if isinstance(segment[0], LinearStep):
        for step in segment:
            assert isinstance(step, LinearStep), "segments are of one kind"
            yield _title(step)
            yield _call(
                "eft_linear_f32",
                f"a + {step.x.offset}",
                step.x.next,
                f"a + {plan.weights + step.weight.offset}",
                step.inputs,
                _bias(plan, step),
                f"a + {step.y.offset + step.y.first}",
                step.y.next,
                step.y.channels,
                "n",
                plan.together,
                _high(step.clamp),
            )
        return
    yield "for (int32_t b = 0; b < n; b++) {"
    for step in segment:
        yield "    " + _title(step)
        for line in _forward_one(plan, step):
            yield "    " + line
    yield "}"


def _bias(plan: HostPlan, step: ConvStep | LinearStep) -> str:
    return f"a + {plan.weights + step.bias.offset if step.bias else plan.zeros}"


def _forward_one(plan: HostPlan, step: Step) -> Iterator[str]:
    if isinstance(step, ConvStep):
        yield from _conv_forward(plan, step)
    elif isinstance(step, PoolStep):
        which = f"(int32_t *)(a + {step.which}) + b * {step.y.height * step.y.width * step.y.column}"
        arguments = [_x(step.x, True), _x(step.y, True), *([which] if step.kind == "max" else []), _pool(step)]
        yield _call(f"eft_{step.kind}_pool_f32", *arguments)
    elif isinstance(step, ClampStep):
        width = step.x.width * step.x.column
        places = (_x(step.x, True), step.x.row, _x(step.y, True), step.y.row, step.x.height, width)
        yield _call("eft_clamp_map_f32", *places, _bound(step.clamp))


def _conv_forward(plan: HostPlan, step: ConvStep) -> Iterator[str]:
    vectors, (out_h, out_w) = step.y.column // LANES, step.out
    pixels, together = _block(out_w, vectors)
    rows = step.pool[0] if step.pool else 1
    down = step.stride[0] * step.x.row
    yield f"for (int32_t i = 0; i < {step.y.height if step.pool else out_h}; i++) {{"
    for k in range(rows):
        yield "    " + _call(
            "eft_conv_row_f32",
            f"{_x(step.x)} + ({rows} * i + {k}) * {down}",
            step.x.row,
            step.stride[1] * step.x.column,
            f"a + {step.taps}",
            step.kernel[0],
            step.row,
            _bias(plan, step),
            f"a + {step.rows + k * out_w * step.y.column}" if step.pool else f"{_x(step.y, True)} + i * {step.y.row}",
            out_w,
            vectors,
            pixels,
            together,
            _high(step.clamp),
        )
    if step.pool:
        which = f"(int32_t *)(a + {step.which}) + (b * {step.y.height} + i) * {step.y.width * step.y.column}"
        yield "    " + _call(
            "eft_max_pool_row_f32",
            f"a + {step.rows}",
            out_w * step.y.column,
            *step.pool,
            f"{_x(step.y, True)} + i * {step.y.row}",
            which,
            step.y.width,
            vectors,
        )
    yield "}"


def _block(width: int, vectors: int) -> tuple[int, int]:
    """Pixels and vectors of channels that a convolution sums up at a time: the pair with the fewest cycles, where two
    products, two loads a cycle, and no sum before its last one 4 cycles ago is ready."""
    pairs = [
        (pixels, together)
        for together in (1, 2, 4)
        if vectors % together == 0
        for pixels in range(1, min(width, 14 // together) + 1)
    ]

    def cycles(pair: tuple[int, int]) -> float:
        pixels, together = pair
        each = max(4.0, pixels * together / 2, (pixels + together) / 2)
        return -(-width // pixels) * (vectors // together) * each

    return min(pairs, key=cycles)


def _pool(step: PoolStep) -> str:
    x, y = step.x, step.y
    numbers = (x.height, x.width, x.row, y.height, y.width, y.row, *step.kernel, *step.stride, *step.padding, x.column)
    return f"(eft_pool){{{', '.join(map(str, numbers))}}}"


# --- backward ---------------------------------------------------------------------------------------------------------


def _backward(plan: HostPlan, segment: list[Step]) -> Iterator[str]:
    if isinstance(segment[0], LinearStep):
        for step in reversed(segment):
            assert isinstance(step, LinearStep), "segments are of one kind"
            yield from _linear_backward(plan, step)
        return
    # A step before the first layer with weights has nothing to learn and nobody to tell.
    learning = [step for step in segment if isinstance(step, ConvStep) or step.x.gradient]
    if learning:
        yield "for (int32_t b = 0; b < n; b++) {"
        for step in reversed(learning):
            yield "    " + _title(step)
            for line in _backward_one(plan, step):
                yield "    " + line
        yield "}"
    for step in learning:
        for parameter in (step.weight, step.bias) if isinstance(step, ConvStep) else ():
            if parameter:
                regions = (plan.weights, plan.velocities, plan.gradients)
                places = (f"a + {region + parameter.offset}" for region in regions)
                yield _call("eft_steps_f32", *places, parameter.num_floats, "rate", "momentum")


def _linear_backward(plan: HostPlan, step: LinearStep) -> Iterator[str]:
    x, y = step.x, step.y
    dy, weight = f"a + {y.gradient + y.first}", f"a + {plan.weights + step.weight.offset}"
    yield _title(step)
    if step.clamp is not None:
        places = (f"a + {y.offset + y.first}", dy, y.next, dy, y.next, "n", y.column)
        yield _call("eft_clamp_map_grad_f32", *places, _bound(step.clamp))
    if x.gradient:
        yield _call(
            "eft_linear_dgrad_f32",
            dy,
            y.next,
            y.channels,
            weight,
            step.inputs,
            f"a + {x.gradient}",
            x.next,
            "n",
            plan.together,
        )
    bias = [f"a + {region + step.bias.offset}" for region in (plan.weights, plan.velocities)] if step.bias else None
    yield _call(
        "eft_linear_update_f32",
        f"a + {x.offset}",
        x.next,
        dy,
        y.next,
        "n",
        weight,
        f"a + {plan.velocities + step.weight.offset}",
        step.inputs,
        *(bias or ("NULL", "NULL")),
        y.channels,
        "rate",
        "momentum",
    )


def _backward_one(plan: HostPlan, step: Step) -> Iterator[str]:
    x, y = step.x, step.y
    if x.gradient:
        yield f"memset({_dx(x)}, 0, {x.next} * sizeof *a);"
    if isinstance(step, ConvStep):
        yield from _conv_backward(plan, step)
    elif isinstance(step, PoolStep):
        which = f"(const int32_t *)(a + {step.which}) + b * {y.height * y.width * y.column}"
        arguments = [_dx(y, True), *([which] if step.kind == "max" else []), _dx(x, True), _pool(step)]
        yield _call(f"eft_{step.kind}_pool_grad_f32", *arguments)
    elif isinstance(step, ClampStep):
        places = (_x(y, True), _dx(y, True), y.row, _dx(x, True), x.row, x.height, x.width * x.column)
        yield _call("eft_clamp_map_grad_f32", *places, _bound(step.clamp))


def _conv_backward(plan: HostPlan, step: ConvStep) -> Iterator[str]:
    x, y, room = step.x, step.y, step.room
    down, right = step.stride[0] * x.row, step.stride[1] * x.column
    pool_h, pool_w = step.pool or (1, 1)
    which = f"(const int32_t *)(a + {step.which}) + b * {y.height * y.width * y.column}" if step.pool else "NULL"
    values = step.entries + y.channels * room
    counts = values + y.channels * room
    places = [k // pool_w * down + k % pool_w * right for k in range(pool_h * pool_w)]
    yield "{"
    yield f"    const int32_t places[] = {{{', '.join(map(str, places))}}};"
    yield "    const eft_entries entries = {"
    yield f"        (int32_t *)(a + {step.entries}), a + {values}, (int32_t *)(a + {counts}), {room}"
    yield "    };"
    for line in _conv_gradients(plan, step, which, pool_h * down, pool_w * right):
        yield "    " + line
    yield "}"


def _conv_gradients(plan: HostPlan, step: ConvStep, which: str, down: int, right: int) -> Iterator[str]:
    x, y, room = step.x, step.y, step.room
    shape = (y.row, y.height, y.width, y.channels, y.column)
    places = (which, "places", down, right, _high(step.clamp), "entries")
    yield _call("eft_collect_entries_f32", _x(y, True), _dx(y, True), *shape, *places)
    yield f"for (int32_t o = 0; o < {y.channels}; o++) {{"
    lists = (f"entries.at + o * {room}", f"entries.value + o * {room}", "entries.count[o]")
    weights = step.kernel[0] * step.padded
    gradient = f"a + {plan.gradients + step.weight.offset} + o * {weights}"
    yield "    " + _call("eft_conv_wgrad_f32", _x(x), x.row, *lists, gradient, step.kernel[0], step.padded)
    if step.bias:
        yield f"    for (int32_t k = 0; k < {lists[2]}; k++) {{"
        yield f"        a[{plan.gradients + step.bias.offset} + o] += entries.value[o * {room} + k];"
        yield "    }"
    yield "}"
    if x.gradient:
        yield f"for (int32_t o = 0; o < {y.channels}; o++) {{"
        weight = f"a + {plan.weights + step.weight.offset} + o * {weights}"
        yield "    " + _call("eft_conv_dgrad_f32", *lists, weight, step.kernel[0], step.row, _dx(x), x.row)
        yield "}"


# --- moving in and out ------------------------------------------------------------------------------------------------


def _prepare(plan: HostPlan) -> Iterator[str]:
    for step in plan.steps:
        if isinstance(step, ConvStep):
            yield _call(
                "eft_conv_taps_f32",
                f"a + {plan.weights + step.weight.offset}",
                step.y.channels,
                step.kernel[0],
                step.row,
                step.padded,
                f"a + {step.taps}",
                step.y.column,
            )


def _move(function: str, plan: HostPlan, outside: str, parameter: Parameter) -> str:
    inside = f"a + {plan.weights + parameter.offset}"
    places = (outside, inside) if function == "eft_from_torch_f32" else (inside, outside)
    return _call(function, *places, f"(eft_layout){{{', '.join(map(str, (*parameter.shape, *parameter.steps)))}}}")


def _sample(m: Map) -> str:
    layout = f"(eft_layout){{1, {m.channels}, {m.height}, {m.width}, 0, {m.row}, {m.column}}}"
    return _call("eft_from_torch_f32", "from", f"{_x(m, True)}", layout)

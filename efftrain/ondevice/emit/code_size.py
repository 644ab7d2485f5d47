"""How much flash the code of a program takes, before it is compiled: an allowance that the build checks.

Measured of the kernels and of 18 programs with arm-none-eabi-gcc 12.2 and zig 0.17, ``-O2``, for Cortex-M0+, M4 and M7;
the largest counts, rounded up. What is linked is up to 5 KB less, most for a processor that others are worse than. For
RV32IMAC 12 programs took 0.77 to 0.85 of it with riscv64-unknown-elf-gcc 12.2, and 1.08 to 1.13 with zig.
"""

import re

from efftrain.ondevice.ir import ConvForward, ConvInputGrad, HeadForward, StepGraph, WeightUpdate, inner_ops
from efftrain.ondevice.target import Family

_START_BYTES = 1280
"""Start-up code, the driver, the compiler's arithmetic helpers, and the functions of a model without an op."""
_LARGE_CALL_BYTES, _SMALL_CALL_BYTES = 112, 40

KERNEL_BYTES = {
    "eft_add_s8": 304,
    "eft_argmax_s16": 80,
    "eft_bias_update_s32": 1648,
    "eft_concat_grad_s16": 192,
    "eft_concat_s8": 104,
    "eft_conv_input_grad_s16": 3216,
    "eft_conv_input_grad_tile_s16": 3120,
    "eft_conv_input_sums_s32": 2496,
    "eft_conv_s8": 3632,
    "eft_conv_update_master_s8": 2848,
    "eft_conv_update_stochastic_s8": 2848,
    "eft_copy": 48,
    "eft_depthwise_input_grad_s16": 1696,
    "eft_depthwise_input_grad_tile_s16": 1728,
    "eft_depthwise_s8": 2704,
    "eft_depthwise_update_master_s8": 2312,
    "eft_depthwise_update_master_tile_s8": 2312,
    "eft_depthwise_update_stochastic_s8": 2368,
    "eft_depthwise_update_stochastic_tile_s8": 2368,
    "eft_global_average_grad_s16": 192,
    "eft_global_average_s8": 512,
    "eft_gradient_sum_s16": 864,
    "eft_grouped_input_grad_s16": 1408,
    "eft_grouped_s8": 3728,
    "eft_grouped_update_master_s8": 2832,
    "eft_grouped_update_stochastic_s8": 2880,
    "eft_head_s8": 736,
    "eft_max_pool_grad_s16": 960,
    "eft_max_pool_s8": 352,
    "eft_move": 80,
    "eft_moved_bias_s32": 128,
    "eft_moved_bias_update_s16": 1744,
    "eft_multiply_factor_grad_s16": 640,
    "eft_multiply_grad_s16": 304,
    "eft_multiply_s8": 416,
    "eft_softmax_loss_s16": 1264,
    "eft_squared_error_s16": 96,
    "eft_squared_loss_s16": 128,
    "eft_step_key": 96,
    "eft_store_sums_s16": 800,
    "eft_table_grad_s16": 208,
    "eft_table_s8": 56,
}
"""By function, with what it calls and its tables."""


def code_bytes(graph: StepGraph, source: str, family: Family) -> int:
    """The allowance for one program.

    Args:
        graph: The step, after the passes.
        source: The generated C.
        family: Of the processor.
    """
    kernels = set(re.findall(r"\b(eft_\w+)\(", source))
    ops = [each for op in graph.ops for each in {*inner_ops(op), op}]
    large = sum(isinstance(op, ConvForward | HeadForward | ConvInputGrad | WeightUpdate) for op in ops)
    moved = sum(isinstance(op, ConvForward) and op.bias is not None for op in ops)
    calls = _LARGE_CALL_BYTES * large + _SMALL_CALL_BYTES * (len(ops) - large + moved)
    total = _START_BYTES + sum(KERNEL_BYTES[name] for name in kernels) + calls
    return -(-total * family.code_percent // 100)

#ifndef EFT_LINEAR_F32_H
#define EFT_LINEAR_F32_H

#include "eft_f32.h"

/** Two outputs of `samples` samples: their dot products side by side. */
EFT_KERNEL void eft_linear_part_f32(const float *x, int32_t x_next, const float *weight, int32_t inputs,
                                    const float *bias, float *y, int32_t y_next, int32_t samples, int32_t outputs,
                                    int32_t clamped, float high)
{
    eft_v8 sum[16];
    EFT_UNROLL
    for (int32_t k = 0; k < samples * outputs; k++) {
        sum[k] = (eft_v8){0};
    }
    for (int32_t i = 0; i < inputs; i += EFT_LANES) {
        EFT_UNROLL
        for (int32_t k = 0; k < samples * outputs; k++) {
            const eft_v8 value = eft_load_f32(x + k / outputs * x_next + i);
            sum[k] += value * eft_load_f32(weight + k % outputs * inputs + i);
        }
    }
    EFT_UNROLL
    for (int32_t k = 0; k < samples * outputs; k++) {
        float value = eft_sum_f32(sum[k]) + bias[k % outputs];
        if (clamped) {
            value = value <= 0.0F ? 0.0F : (value > high ? high : value);
        }
        y[k / outputs * y_next + k % outputs] = value;
    }
}

/**
 * Linear layer of a batch.
 *
 *   y[b][o] = bias[o] + sum_i x[b][i] * weight[o][i]
 *
 * @param[in]  x        [batch][x_next], of which inputs count
 * @param[in]  weight   [outputs][inputs]; inputs is a multiple of 8
 * @param[in]  batch    Samples; rows up to the next multiple of together exist and are computed too
 * @param[out] y        [batch][y_next], of which outputs are written
 */
EFT_KERNEL void eft_linear_f32(const float *x, int32_t x_next, const float *weight, int32_t inputs, const float *bias,
                               float *y, int32_t y_next, int32_t outputs, int32_t batch, int32_t together,
                               int32_t clamped, float high)
{
    for (int32_t b = 0; b < batch; b += together) {
        const float *from = x + b * x_next;
        float *to = y + b * y_next;
        for (int32_t o = 0; o + 2 <= outputs; o += 2) {
            eft_linear_part_f32(from, x_next, weight + o * inputs, inputs, bias + o, to + o, y_next, together, 2,
                                clamped, high);
        }
        if (outputs % 2) {
            const int32_t o = outputs - 1;
            eft_linear_part_f32(from, x_next, weight + o * inputs, inputs, bias + o, to + o, y_next, together, 1,
                                clamped, high);
        }
    }
}

#endif

#ifndef EFT_LINEAR_UPDATE_F32_H
#define EFT_LINEAR_UPDATE_F32_H

#include "eft_f32.h"
#include "eft_step_f32.h"

EFT_KERNEL void eft_linear_update_part_f32(const float *x, int32_t x_next, const float *dy, int32_t y_next,
                                           int32_t batch, float *weight, float *velocity, int32_t inputs, float rate,
                                           float momentum, int32_t outputs, int32_t vectors)
{
    eft_v8 sum[16];
    EFT_UNROLL
    for (int32_t k = 0; k < outputs * vectors; k++) {
        sum[k] = (eft_v8){0};
    }
    for (int32_t b = 0; b < batch; b++) {
        EFT_UNROLL
        for (int32_t k = 0; k < outputs * vectors; k++) {
            sum[k] += dy[b * y_next + k / vectors] * eft_load_f32(x + b * x_next + k % vectors * EFT_LANES);
        }
    }
    EFT_UNROLL
    for (int32_t k = 0; k < outputs * vectors; k++) {
        const int32_t place = k / vectors * inputs + k % vectors * EFT_LANES;
        eft_step_f32(weight + place, velocity + place, sum[k], rate, momentum);
    }
}

/** All columns of `outputs` rows. */
EFT_KERNEL void eft_linear_update_rows_f32(const float *x, int32_t x_next, const float *dy, int32_t y_next,
                                           int32_t batch, float *weight, float *velocity, int32_t inputs, float rate,
                                           float momentum, int32_t outputs)
{
    const int32_t vectors = inputs / EFT_LANES < 6 ? inputs / EFT_LANES : 6;
    const int32_t left = inputs / EFT_LANES % vectors;
    for (int32_t i = 0; i + vectors * EFT_LANES <= inputs; i += vectors * EFT_LANES) {
        eft_linear_update_part_f32(x + i, x_next, dy, y_next, batch, weight + i, velocity + i, inputs, rate, momentum,
                                   outputs, vectors);
    }
    if (left) {
        const int32_t i = inputs - left * EFT_LANES;
        eft_linear_update_part_f32(x + i, x_next, dy, y_next, batch, weight + i, velocity + i, inputs, rate, momentum,
                                   outputs, left);
    }
}

/**
 * Weight and bias gradient of a linear layer, and the step that follows from them, in one pass over the weights.
 *
 *   weight[o][i] -= rate * sum_b dy[b][o] * x[b][i];  bias[o] -= rate * sum_b dy[b][o]
 *
 * @param[in]     x         [batch][x_next], of which inputs count
 * @param[in]     dy        [batch][y_next]
 * @param[in,out] weight    [outputs][inputs]; inputs is a multiple of 8
 * @param[in,out] bias      [outputs]; NULL if the layer has none
 * @param[in,out] velocity  As weight; bias_velocity as bias. See eft_step_f32
 */
EFT_KERNEL void eft_linear_update_f32(const float *x, int32_t x_next, const float *dy, int32_t y_next, int32_t batch,
                                      float *weight, float *velocity, int32_t inputs, float *bias,
                                      float *bias_velocity, int32_t outputs, float rate, float momentum)
{
    for (int32_t o = 0; o + 2 <= outputs; o += 2) {
        eft_linear_update_rows_f32(x, x_next, dy + o, y_next, batch, weight + o * inputs, velocity + o * inputs,
                                   inputs, rate, momentum, 2);
    }
    if (outputs % 2) {
        const int32_t o = outputs - 1;
        eft_linear_update_rows_f32(x, x_next, dy + o, y_next, batch, weight + o * inputs, velocity + o * inputs,
                                   inputs, rate, momentum, 1);
    }
    for (int32_t o = 0; bias && o < outputs; o++) {
        float sum = 0.0F;
        for (int32_t b = 0; b < batch; b++) {
            sum += dy[b * y_next + o];
        }
        bias_velocity[o] = momentum * bias_velocity[o] + sum;
        bias[o] -= rate * bias_velocity[o];
    }
}

#endif

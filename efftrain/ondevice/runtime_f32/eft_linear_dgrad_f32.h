#ifndef EFT_LINEAR_DGRAD_F32_H
#define EFT_LINEAR_DGRAD_F32_H

#include "eft_f32.h"

EFT_KERNEL void eft_linear_dgrad_part_f32(const float *dy, int32_t y_next, int32_t outputs, const float *weight,
                                          int32_t inputs, float *dx, int32_t x_next, int32_t samples, int32_t vectors)
{
    eft_v8 sum[16];
    EFT_UNROLL
    for (int32_t k = 0; k < samples * vectors; k++) {
        sum[k] = (eft_v8){0};
    }
    for (int32_t o = 0; o < outputs; o++) {
        EFT_UNROLL
        for (int32_t k = 0; k < samples * vectors; k++) {
            sum[k] += dy[k / vectors * y_next + o] * eft_load_f32(weight + o * inputs + k % vectors * EFT_LANES);
        }
    }
    EFT_UNROLL
    for (int32_t k = 0; k < samples * vectors; k++) {
        eft_store_f32(dx + k / vectors * x_next + k % vectors * EFT_LANES, sum[k]);
    }
}

/**
 * Input gradient of a linear layer.
 *
 *   dx[b][i] = sum_o dy[b][o] * weight[o][i]
 *
 * @param[in]  dy       [batch][y_next], of which outputs count
 * @param[in]  weight   [outputs][inputs]; inputs is a multiple of 8
 * @param[in]  batch    As for eft_linear_f32
 * @param[out] dx       [batch][x_next], of which inputs are written
 */
EFT_KERNEL void eft_linear_dgrad_f32(const float *dy, int32_t y_next, int32_t outputs, const float *weight,
                                     int32_t inputs, float *dx, int32_t x_next, int32_t batch, int32_t together)
{
    for (int32_t i = 0; i + 2 * EFT_LANES <= inputs; i += 2 * EFT_LANES) {
        for (int32_t b = 0; b < batch; b += together) {
            eft_linear_dgrad_part_f32(dy + b * y_next, y_next, outputs, weight + i, inputs, dx + b * x_next + i,
                                      x_next, together, 2);
        }
    }
    if (inputs % (2 * EFT_LANES)) {
        const int32_t i = inputs - EFT_LANES;
        for (int32_t b = 0; b < batch; b += together) {
            eft_linear_dgrad_part_f32(dy + b * y_next, y_next, outputs, weight + i, inputs, dx + b * x_next + i,
                                      x_next, together, 1);
        }
    }
}

#endif

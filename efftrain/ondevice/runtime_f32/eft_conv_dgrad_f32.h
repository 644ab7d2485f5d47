#ifndef EFT_CONV_DGRAD_F32_H
#define EFT_CONV_DGRAD_F32_H

#include "eft_f32.h"

/**
 * What one output channel of a convolution adds to the gradient of its input, over one sample.
 *
 *   dx[at[n] + ky * x_row + t] += value[n] * weight[ky][t]
 *
 * @param[in]     at       Entries of this channel; see eft_entries
 * @param[in]     weight   [kernel_h][row]; row is a multiple of 8
 * @param[in,out] dx       Laid out as the input, border included; the caller clears it
 */
EFT_KERNEL void eft_conv_dgrad_f32(const int32_t *at, const float *value, int32_t count, const float *weight,
                                   int32_t kernel_h, int32_t row, float *dx, int32_t x_row)
{
    for (int32_t n = 0; n < count; n++) {
        float *to = dx + at[n];
        const float g = value[n];
        for (int32_t ky = 0; ky < kernel_h; ky++) {
            EFT_UNROLL
            for (int32_t t = 0; t < row; t += EFT_LANES) {
                float *place = to + ky * x_row + t;
                eft_store_f32(place, eft_load_f32(place) + g * eft_load_f32(weight + ky * row + t));
            }
        }
    }
}

#endif

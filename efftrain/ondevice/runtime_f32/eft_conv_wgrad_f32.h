#ifndef EFT_CONV_WGRAD_F32_H
#define EFT_CONV_WGRAD_F32_H

#include "eft_f32.h"

/** The part of the sums that fits the registers: rows x vectors of them. */
EFT_KERNEL void eft_conv_wgrad_part_f32(const float *x, int32_t x_row, const int32_t *at, const float *value,
                                        int32_t count, float *dw, int32_t padded, int32_t rows, int32_t vectors)
{
    eft_v8 sum[EFT_SUMS];
    EFT_UNROLL
    for (int32_t k = 0; k < rows * vectors; k++) {
        sum[k] = eft_load_f32(dw + k / vectors * padded + k % vectors * EFT_LANES);
    }
    for (int32_t n = 0; n < count; n++) {
        const float *from = x + at[n];
        const float g = value[n];
        EFT_UNROLL
        for (int32_t k = 0; k < rows * vectors; k++) {
            sum[k] += g * eft_load_f32(from + k / vectors * x_row + k % vectors * EFT_LANES);
        }
    }
    EFT_UNROLL
    for (int32_t k = 0; k < rows * vectors; k++) {
        eft_store_f32(dw + k / vectors * padded + k % vectors * EFT_LANES, sum[k]);
    }
}

/**
 * Weight gradient of one output channel of a convolution over one sample.
 *
 *   dw[ky][t] += sum_n value[n] * x[at[n] + ky * x_row + t]
 *
 * @param[in]     x        Input inside its border
 * @param[in]     at       Entries of this channel; see eft_entries
 * @param[in,out] dw       [kernel_h][padded]; what lies beyond a row that is no multiple of 8 has no meaning
 */
EFT_KERNEL void eft_conv_wgrad_f32(const float *x, int32_t x_row, const int32_t *at, const float *value, int32_t count,
                                   float *dw, int32_t kernel_h, int32_t padded)
{
    const int32_t vectors = padded / EFT_LANES;
    const int32_t wide = vectors < EFT_SUMS ? vectors : EFT_SUMS;
    const int32_t high = EFT_SUMS / wide < kernel_h ? EFT_SUMS / wide : kernel_h;
    const int32_t last_wide = vectors % wide;
    const int32_t last_high = kernel_h % high;
    for (int32_t ky = 0; ky + high <= kernel_h; ky += high) {
        for (int32_t v = 0; v + wide <= vectors; v += wide) {
            const int32_t t = v * EFT_LANES;
            eft_conv_wgrad_part_f32(x + ky * x_row + t, x_row, at, value, count, dw + ky * padded + t, padded, high,
                                    wide);
        }
        if (last_wide) { /* high is 1 */
            const int32_t t = (vectors - last_wide) * EFT_LANES;
            eft_conv_wgrad_part_f32(x + ky * x_row + t, x_row, at, value, count, dw + ky * padded + t, padded, high,
                                    last_wide);
        }
    }
    if (last_high) { /* vectors is wide */
        const int32_t ky = kernel_h - last_high;
        eft_conv_wgrad_part_f32(x + ky * x_row, x_row, at, value, count, dw + ky * padded, padded, last_high, wide);
    }
}

#endif

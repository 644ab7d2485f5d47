#ifndef EFT_CONV_WGRAD_F32_H
#define EFT_CONV_WGRAD_F32_H

#include "eft_f32.h"

/** The part of the sums that fits the registers: rows x vectors of them, in pairs where there are some. */
EFT_KERNEL void eft_conv_wgrad_part_f32(const float *x, int32_t x_row, const int32_t *at, const float *value,
                                        int32_t count, float *dw, int32_t padded, int32_t rows, int32_t vectors)
{
    const int32_t pairs = EFT_PAIRS ? vectors / 2 : 0;
    const int32_t singles = vectors - 2 * pairs;
    const int32_t behind = 2 * EFT_LANES * pairs;
    eft_v16 pair[EFT_SUMS];
    eft_v8 single[EFT_SUMS];
    EFT_UNROLL
    for (int32_t r = 0; r < rows; r++) {
        EFT_UNROLL
        for (int32_t v = 0; v < pairs; v++) {
            pair[r * pairs + v] = eft_load_pair_f32(dw + r * padded + v * 2 * EFT_LANES);
        }
    }
    EFT_UNROLL
    for (int32_t r = 0; r < rows; r++) {
        EFT_UNROLL
        for (int32_t v = 0; v < singles; v++) {
            single[r * singles + v] = eft_load_f32(dw + r * padded + behind + v * EFT_LANES);
        }
    }
    for (int32_t n = 0; n < count; n++) {
        const float *from = x + at[n];
        const float g = value[n];
        EFT_UNROLL
        for (int32_t r = 0; r < rows; r++) {
            EFT_UNROLL
            for (int32_t v = 0; v < pairs; v++) {
                pair[r * pairs + v] += g * eft_load_pair_f32(from + r * x_row + v * 2 * EFT_LANES);
            }
        }
        EFT_UNROLL
        for (int32_t r = 0; r < rows; r++) {
            EFT_UNROLL
            for (int32_t v = 0; v < singles; v++) {
                single[r * singles + v] += g * eft_load_f32(from + r * x_row + behind + v * EFT_LANES);
            }
        }
    }
    EFT_UNROLL
    for (int32_t r = 0; r < rows; r++) {
        EFT_UNROLL
        for (int32_t v = 0; v < pairs; v++) {
            eft_store_pair_f32(dw + r * padded + v * 2 * EFT_LANES, pair[r * pairs + v]);
        }
    }
    EFT_UNROLL
    for (int32_t r = 0; r < rows; r++) {
        EFT_UNROLL
        for (int32_t v = 0; v < singles; v++) {
            eft_store_f32(dw + r * padded + behind + v * EFT_LANES, single[r * singles + v]);
        }
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

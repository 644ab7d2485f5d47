#ifndef EFT_MAX_POOL_ROW_F32_H
#define EFT_MAX_POOL_ROW_F32_H

#include "eft_f32.h"

/**
 * One row of windows that touch but do not overlap: the largest value of each, and which of the window it was.
 *
 * @param[in]  x        kernel_h rows of [at least width * kernel_w][8 * vectors]
 * @param[in]  x_row    Floats from one row of x to the next
 * @param[out] y        [width][8 * vectors]
 * @param[out] which    [width][8 * vectors], row of the window times kernel_w plus column; the first of equals
 */
EFT_KERNEL void eft_max_pool_row_f32(const float *x, int32_t x_row, int32_t kernel_h, int32_t kernel_w, float *y,
                                     int32_t *which, int32_t width, int32_t vectors)
{
    const int32_t channels = EFT_LANES * vectors;
    for (int32_t p = 0; p < width; p++) {
        for (int32_t v = 0; v < vectors; v++) {
            const float *from = x + p * kernel_w * channels + EFT_LANES * v;
            eft_v8 largest = eft_load_f32(from);
            eft_i8 place = {0};
            EFT_UNROLL
            for (int32_t k = 1; k < kernel_h * kernel_w; k++) {
                const eft_v8 value = eft_load_f32(from + k / kernel_w * x_row + k % kernel_w * channels);
                const eft_i8 larger = ~(value <= largest); /* so that NaN is kept */
                const eft_i8 here = place - place + k;
                largest = eft_select_f32(larger, value, largest);
                place = (larger & here) | (~larger & place);
            }
            eft_store_f32(y + p * channels + EFT_LANES * v, largest);
            memcpy(which + p * channels + EFT_LANES * v, &place, sizeof place);
        }
    }
}

#endif

#ifndef EFT_CLAMP_MAP_F32_H
#define EFT_CLAMP_MAP_F32_H

#include "eft_f32.h"

/** y = x clamped to [0, high]: `rows` rows of `width` floats, a multiple of 8, x_row and y_row apart. */
EFT_KERNEL void eft_clamp_map_f32(const float *x, int32_t x_row, float *y, int32_t y_row, int32_t rows, int32_t width,
                                  float high)
{
    for (int32_t i = 0; i < rows; i++) {
        for (int32_t j = 0; j < width; j += EFT_LANES) {
            eft_store_f32(y + i * y_row + j, eft_clamp_f32(eft_load_f32(x + i * x_row + j), high));
        }
    }
}

/** dx = dy where the output y lay inside (0, high), else 0; dy may be dx. */
EFT_KERNEL void eft_clamp_map_grad_f32(const float *y, const float *dy, int32_t y_row, float *dx, int32_t x_row,
                                       int32_t rows, int32_t width, float high)
{
    for (int32_t i = 0; i < rows; i++) {
        for (int32_t j = 0; j < width; j += EFT_LANES) {
            const eft_v8 g = eft_load_f32(dy + i * y_row + j);
            eft_store_f32(dx + i * x_row + j, eft_clamp_grad_f32(eft_load_f32(y + i * y_row + j), g, high));
        }
    }
}

#endif

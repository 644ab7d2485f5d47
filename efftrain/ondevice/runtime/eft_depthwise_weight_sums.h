/** Gradients with respect to the weights of a depthwise layer. Not part of the contract. */
#ifndef EFT_DEPTHWISE_WEIGHT_SUMS_H
#define EFT_DEPTHWISE_WEIGHT_SUMS_H

#include "eft_seen.h"

/** sums[c] = sum over pixels of gradient * input, for channels [0, count) of a depthwise layer. */
static EFT_OUT_OF_LINE void eft_depthwise_weight_sums(const eft_seen *seen, int32_t x_zero_point, int32_t cut, int32_t count,
                                                      int32_t *sums)
{
    for (int32_t c = 0; c < count; c++) {
        sums[c] = 0;
    }
    for (int32_t y = 0; y < seen->rows; y++) {
        const int16_t *value = seen->g + y * seen->g_row;
        const int8_t *pixel = seen->x + y * seen->x_row;
        for (int32_t column = 0; column < seen->columns; column++) {
            for (int32_t c = 0; c < count; c++) {
                sums[c] += eft_rsh32(value[c], cut) * ((int32_t)pixel[c] - x_zero_point);
            }
            value += seen->g_column;
            pixel += seen->x_column;
        }
    }
}

#endif

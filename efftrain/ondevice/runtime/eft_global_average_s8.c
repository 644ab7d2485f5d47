#include "eft_internal.h"

void eft_global_average_s8(const int8_t *x, int32_t pixels, int32_t channels, int32_t x_zero_point, int32_t multiplier,
                           int32_t shift, int8_t *y)
{
    for (int32_t c = 0; c < channels; c++) {
        int32_t sum = 0;
        for (int32_t p = 0; p < pixels; p++) {
            sum += (int32_t)x[p * channels + c] - x_zero_point;
        }
        y[c] = (int8_t)eft_clamp64(eft_rsh((int64_t)sum * multiplier, shift) + x_zero_point, -128, 127);
    }
}

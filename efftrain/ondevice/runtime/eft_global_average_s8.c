#include "eft_internal.h"

/** Channels at a time, which lie together. */
#define BLOCK 16

void eft_global_average_s8(const int8_t *x, int32_t pixels, int32_t channels, int32_t x_zero_point, int32_t multiplier,
                           int32_t shift, int8_t *y)
{
    for (int32_t first = 0; first < channels; first += BLOCK) {
        const int32_t count = channels - first < BLOCK ? channels - first : BLOCK;
        int32_t sums[BLOCK] = {0};
        for (int32_t p = 0; p < pixels; p++) {
            for (int32_t c = 0; c < count; c++) {
                sums[c] += (int32_t)x[p * channels + first + c] - x_zero_point;
            }
        }
        for (int32_t c = 0; c < count; c++) {
            const int64_t value = eft_rsh((int64_t)sums[c] * multiplier, shift) + x_zero_point;
            y[first + c] = (int8_t)eft_clamp64(value, -128, 127);
        }
    }
}

#include "eft_internal.h"

void eft_add_s8(const int8_t *x, const int8_t *z, const eft_sum *sum, int32_t count, int8_t *y, uint8_t *mask)
{
    uint32_t passes = 0;
    for (int32_t i = 0; i < count; i++) {
        /* Below 2^30, so that the rounding term has room. */
        const int32_t total = ((int32_t)x[i] - sum->x_zero_point) * sum->x_multiplier +
                              ((int32_t)z[i] - sum->z_zero_point) * sum->z_multiplier;
        const int32_t value = eft_rsh32(total, sum->shift) + sum->zero_point;
        if (mask != NULL) {
            passes |= (value >= sum->pass_minimum && value <= 127 ? 1U : 0U) << (i & 7);
            if ((i & 7) == 7 || i == count - 1) {
                mask[i >> 3] = (uint8_t)passes;
                passes = 0;
            }
        }
        y[i] = (int8_t)eft_clamp(value, sum->minimum, 127);
    }
}

#include "eft_internal.h"

void eft_moved_bias_s32(const int32_t *base, const int16_t *moved, const int8_t *shift, int32_t channels, int32_t *bias)
{
    for (int32_t o = 0; o < channels; o++) {
        const int32_t far = moved[o] * (int32_t)(1U << (uint32_t)eft_bias_unit(shift[o]));
        bias[o] = eft_clamp(base[o] + far, -EFT_BIAS_LIMIT, EFT_BIAS_LIMIT);
    }
}

#include "eft_internal.h"

int32_t eft_multiply_grad_s16(const int16_t *g, int32_t g_bits, const int8_t *other, int32_t other_zero_point,
                              int32_t other_pixels, int32_t pixels, int32_t channels, const uint8_t *mask, int16_t *gx)
{
    const int32_t shift = g_bits > 7 ? g_bits - 7 : 0;
    uint32_t seen = 0;
    int32_t index = 0;
    for (int32_t p = 0; p < pixels; p++) {
        const int8_t *factor = other + (other_pixels == 1 ? 0 : p * channels);
        for (int32_t c = 0; c < channels; c++) {
            int32_t value = 0;
            if (eft_passes(mask, index)) {
                value = eft_clamp(eft_rsh32(g[index] * (factor[c] - other_zero_point), shift), -32767, 32767);
            }
            gx[index] = (int16_t)value;
            seen |= eft_magnitude(value);
            index++;
        }
    }
    return eft_bit_length(seen);
}

#include "eft_internal.h"

int32_t eft_concat_grad_s16(const int16_t *g, int32_t pixels, int32_t channels, int32_t first, int32_t g_channels,
                            const uint8_t *mask, int16_t *gx)
{
    uint32_t seen = 0;
    int32_t index = 0;
    for (int32_t p = 0; p < pixels; p++) {
        for (int32_t c = 0; c < channels; c++) {
            const int16_t value = eft_passes(mask, index) ? g[p * g_channels + first + c] : (int16_t)0;
            gx[index] = value;
            seen |= eft_magnitude(value);
            index++;
        }
    }
    return eft_bit_length(seen);
}

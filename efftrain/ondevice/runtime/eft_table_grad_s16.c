#include "eft_internal.h"

int32_t eft_table_grad_s16(const int16_t *g, int32_t g_bits, const int8_t *x, const int16_t *slope, int32_t count,
                           const uint8_t *x_mask, int16_t *gx)
{
    uint32_t seen = 0;
    for (int32_t i = 0; i < count; i++) {
        int32_t value = 0;
        if (eft_passes(x_mask, i)) {
            value = eft_clamp(eft_rsh32((int32_t)g[i] * slope[x[i] + 128], g_bits), -32767, 32767);
        }
        gx[i] = (int16_t)value;
        seen |= eft_magnitude(value);
    }
    return eft_bit_length(seen);
}

#include "eft_internal.h"

int32_t eft_squared_loss_s16(const int16_t *y, const int8_t *target, int32_t count, int16_t *g)
{
    uint32_t seen = 0;
    for (int32_t i = 0; i < count; i++) {
        const int32_t value = eft_clamp(y[i] - 64 * target[i], -32767, 32767);
        g[i] = (int16_t)value;
        seen |= eft_magnitude(value);
    }
    return eft_bit_length(seen);
}

#include "eft_internal.h"

int32_t eft_squared_error_s16(const int16_t *y, const int8_t *target, int32_t count)
{
    uint32_t total = 0;
    for (int32_t i = 0; i < count; i++) {
        const uint32_t difference = eft_magnitude(y[i] - 64 * target[i]);
        total += (difference * difference) >> 12;
    }
    return (int32_t)(total / (uint32_t)count);
}

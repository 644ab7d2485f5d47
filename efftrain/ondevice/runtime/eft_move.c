#include "eft_internal.h"

void eft_move(void *to, const void *from, uint32_t num_bytes)
{
    uint32_t *target = (uint32_t *)to;
    const uint32_t *source = (const uint32_t *)from;
    const uint32_t count = (num_bytes + 3U) / 4U;
    if (target < source) {
        for (uint32_t i = 0; i < count; i++) {
            target[i] = source[i];
        }
    } else {
        for (uint32_t i = count; i > 0U; i--) {
            target[i - 1U] = source[i - 1U];
        }
    }
}

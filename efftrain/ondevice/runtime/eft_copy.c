#include "eft_internal.h"

void eft_copy(void *to, const void *from, uint32_t num_bytes)
{
    uint8_t *target = (uint8_t *)to;
    const uint8_t *source = (const uint8_t *)from;
    for (uint32_t i = 0; i < num_bytes; i++) {
        target[i] = source[i];
    }
}

#include "efc.h"

void efc_unpack_3_u8(const uint8_t *restrict packed, int64_t num_bytes, uint8_t *restrict digits)
{
    for (int64_t i = 0; i < num_bytes; i++) {
        const uint32_t byte = packed[i];
        uint8_t *d = digits + 5 * i;
        d[0] = (uint8_t)(byte % 3);
        d[1] = (uint8_t)(byte / 3 % 3);
        d[2] = (uint8_t)(byte / 9 % 3);
        d[3] = (uint8_t)(byte / 27 % 3);
        d[4] = (uint8_t)(byte / 81);
    }
}

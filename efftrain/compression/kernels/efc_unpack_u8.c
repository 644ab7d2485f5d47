#include "efc.h"

static inline void split(uint8_t byte, uint8_t *codes, int64_t count, uint32_t bits)
{
    for (int64_t i = 0; i < count; i++) {
        codes[i] = (uint8_t)(((uint32_t)byte >> ((uint32_t)i * bits)) & ((1u << bits) - 1));
    }
}

/* Four codes in three bytes. */
static void unpack_6(const uint8_t *restrict packed, int64_t n, uint8_t *restrict codes)
{
    const int64_t whole = n / 4;
    for (int64_t i = 0; i < whole; i++) {
        const uint8_t *p = packed + 3 * i;
        codes[4 * i] = p[0] & 63u;
        codes[4 * i + 1] = (uint8_t)((p[0] >> 6 | (uint32_t)p[1] << 2) & 63u);
        codes[4 * i + 2] = (uint8_t)((p[1] >> 4 | (uint32_t)p[2] << 4) & 63u);
        codes[4 * i + 3] = p[2] >> 2;
    }
    uint32_t word = 0;
    for (int64_t bit = 0; bit < 6 * (n & 3); bit += 8) {
        word |= (uint32_t)packed[3 * whole + bit / 8] << bit;
    }
    for (int64_t i = 4 * whole; i < n; i++) {
        codes[i] = (uint8_t)(word >> (6 * (i & 3)) & 63u);
    }
}

void efc_unpack_u8(const uint8_t *restrict packed, int64_t n, int32_t bits, uint8_t *restrict codes)
{
    if (bits == 6) {
        unpack_6(packed, n, codes);
        return;
    }
    const int64_t each = 8 / bits;
    const int64_t whole = n / each;
    /* The number of bits written out, so that each loop becomes vector code. */
    if (bits == 4) {
        for (int64_t i = 0; i < whole; i++) {
            split(packed[i], codes + 2 * i, 2, 4);
        }
    } else if (bits == 2) {
        for (int64_t i = 0; i < whole; i++) {
            split(packed[i], codes + 4 * i, 4, 2);
        }
    } else {
        for (int64_t i = 0; i < whole; i++) {
            split(packed[i], codes + 8 * i, 8, 1);
        }
    }
    if (whole * each < n) {
        split(packed[whole], codes + whole * each, n - whole * each, (uint32_t)bits);
    }
}

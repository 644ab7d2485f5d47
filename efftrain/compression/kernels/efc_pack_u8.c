#include "efc.h"

static inline uint8_t join(const uint8_t *codes, int64_t count, uint32_t bits)
{
    const uint32_t mask = (1u << bits) - 1;
    uint32_t byte = 0;
    for (int64_t i = 0; i < count; i++) {
        byte |= (codes[i] & mask) << ((uint32_t)i * bits);
    }
    return (uint8_t)byte;
}

/* Four codes in three bytes. */
static void pack_6(const uint8_t *restrict codes, int64_t n, uint8_t *restrict packed)
{
    const int64_t whole = n / 4;
    for (int64_t i = 0; i < whole; i++) {
        const uint8_t *c = codes + 4 * i;
        packed[3 * i] = (uint8_t)((c[0] & 63u) | (uint32_t)c[1] << 6);
        packed[3 * i + 1] = (uint8_t)((c[1] & 63u) >> 2 | (uint32_t)c[2] << 4);
        packed[3 * i + 2] = (uint8_t)((c[2] & 63u) >> 4 | (uint32_t)c[3] << 2);
    }
    uint32_t word = 0;
    for (int64_t i = 4 * whole; i < n; i++) {
        word |= (codes[i] & 63u) << (6 * (i & 3));
    }
    for (int64_t bit = 0; bit < 6 * (n & 3); bit += 8) {
        packed[3 * whole + bit / 8] = (uint8_t)(word >> bit);
    }
}

void efc_pack_u8(const uint8_t *restrict codes, int64_t n, int32_t bits, uint8_t *restrict packed)
{
    if (bits == 6) {
        pack_6(codes, n, packed);
        return;
    }
    const int64_t each = 8 / bits;
    const int64_t whole = n / each;
    /* The number of bits written out, so that each loop becomes vector code. */
    if (bits == 4) {
        for (int64_t i = 0; i < whole; i++) {
            packed[i] = join(codes + 2 * i, 2, 4);
        }
    } else if (bits == 2) {
        for (int64_t i = 0; i < whole; i++) {
            packed[i] = join(codes + 4 * i, 4, 2);
        }
    } else {
        for (int64_t i = 0; i < whole; i++) {
            packed[i] = join(codes + 8 * i, 8, 1);
        }
    }
    if (whole * each < n) {
        packed[whole] = join(codes + whole * each, n - whole * each, (uint32_t)bits);
    }
}

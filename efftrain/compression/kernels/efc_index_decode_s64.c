#include "efc.h"

int32_t efc_index_decode_s64(const uint8_t *restrict lows, const uint8_t *restrict highs, int64_t num_highs, int64_t k,
                             int64_t n, int32_t low, int64_t *restrict places)
{
    const uint64_t mask = ((uint64_t)1 << low) - 1;
    uint64_t waiting = 0; /* bits read and not used yet */
    int32_t num_bits = 0;
    int64_t found = 0;
    int64_t previous = -1;
    for (int64_t byte = 0; byte < num_highs; byte++) {
        const uint32_t bits = highs[byte];
        for (int64_t bit = 0; bits >> bit; bit++) {
            if (!((bits >> bit) & 1u)) {
                continue;
            }
            if (found == k) {
                return EFC_MALFORMED;
            }
            while (num_bits < low) {
                waiting |= (uint64_t)*lows++ << num_bits;
                num_bits += 8;
            }
            const int64_t place = ((byte * 8 + bit - found) << low) | (int64_t)(waiting & mask);
            waiting >>= low;
            num_bits -= low;
            if (place <= previous || place >= n) {
                return EFC_MALFORMED;
            }
            places[found++] = place;
            previous = place;
        }
    }
    return found == k ? EFC_OK : EFC_MALFORMED;
}

#include "efc.h"

void efc_index_encode_s64(const int64_t *restrict places, int64_t k, int32_t low, uint8_t *restrict lows,
                          uint8_t *restrict highs)
{
    const uint64_t mask = ((uint64_t)1 << low) - 1;
    uint64_t waiting = 0; /* bits not written yet, num_bits < 8 of them between places */
    int32_t num_bits = 0;
    for (int64_t i = 0; i < k; i++) {
        const uint64_t place = (uint64_t)places[i];
        const uint64_t bit = (place >> low) + (uint64_t)i;
        highs[bit >> 3] = (uint8_t)(highs[bit >> 3] | (1u << (bit & 7)));
        waiting |= (place & mask) << num_bits;
        num_bits += low;
        while (num_bits >= 8) {
            *lows++ = (uint8_t)waiting;
            waiting >>= 8;
            num_bits -= 8;
        }
    }
    if (num_bits > 0) {
        *lows = (uint8_t)waiting;
    }
}

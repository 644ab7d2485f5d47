#include "efc.h"

/* Up to 8 bytes, the first one lowest. */
static uint64_t load(const uint8_t *from, int64_t num_bytes)
{
    uint64_t word = 0;
    if (num_bytes >= 8) {
        memcpy(&word, from, 8);
    } else {
        for (int64_t i = 0; i < num_bytes; i++) {
            word |= (uint64_t)from[i] << (8 * i);
        }
    }
    return word;
}

int32_t efc_index_decode_s64(const uint8_t *restrict lows, const uint8_t *restrict highs, int64_t num_highs, int64_t k,
                             int64_t n, int32_t low, int64_t *restrict places)
{
    const int64_t num_lows = (k * low + 7) / 8;
    const uint64_t mask = ((uint64_t)1 << low) - 1;
    int64_t found = 0;
    int64_t previous = -1;
    int malformed = 0;
    for (int64_t byte = 0; byte < num_highs; byte += 8) {
        for (uint64_t word = load(highs + byte, num_highs - byte); word; word &= word - 1) {
            if (found == k) {
                return EFC_MALFORMED;
            }
            const int64_t at = found * low;
            const uint64_t rest = load(lows + at / 8, num_lows - at / 8) >> (at % 8);
            const int64_t place = ((byte * 8 + efc_lowest_bit(word) - found) << low) | (int64_t)(rest & mask);
            malformed |= place <= previous || place >= n;
            places[found++] = place;
            previous = place;
        }
    }
    return found == k && !malformed ? EFC_OK : EFC_MALFORMED;
}

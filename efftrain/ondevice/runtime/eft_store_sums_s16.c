#include "eft_gradient.h"

/** Sums at a time. */
#define SOME 32

int32_t eft_store_sums_s16(const int32_t *sums, int32_t count, int32_t shift, const uint8_t *mask, int16_t *gx)
{
    uint32_t seen = 0;
    for (int32_t first = 0; first < count; first += SOME) {
        const int32_t some = count - first < SOME ? count - first : SOME;
        int32_t taken[SOME];
        /* Before anything is written over them, by a call that no compiler may move. */
        eft_move(taken, sums + first, (uint32_t)some * 4U);
        seen |= eft_store_gradient(taken, some, shift, mask, first, gx + first);
    }
    return eft_bit_length(seen);
}

/** From int32 sums to a gradient. Not part of the contract. */
#ifndef EFT_GRADIENT_H
#define EFT_GRADIENT_H

#include "eft_internal.h"

/**
 * Elements [index, index + count) of a gradient from their sums: rsh(sum, shift) held to 16 bits, 0 where the mask is 0.
 *
 * @return  All bits of all magnitudes
 */
static EFT_OUT_OF_LINE uint32_t eft_store_gradient(const int32_t *sums, int32_t count, int32_t shift, const uint8_t *mask,
                                                   int32_t index, int16_t *gx)
{
    uint32_t seen = 0;
    if (shift < 1 || shift > 30) {
        for (int32_t i = 0; i < count; i++) {
            const int32_t value =
                eft_passes(mask, index + i) ? (int32_t)eft_clamp64(eft_rsh(sums[i], shift), -32767, 32767) : 0;
            gx[index + i] = (int16_t)value;
            seen |= eft_magnitude(value);
        }
        return seen;
    }
    int16_t *to = gx + index;
    for (int32_t i = 0; i < count; i++) {
        int32_t value = 0;
        if (eft_passes(mask, index + i)) {
            /* Rounded half up: ((v >> (n - 1)) + 1) >> 1, and the sums leave room for the 1. */
            value = eft_clamp(((sums[i] >> (shift - 1)) + 1) >> 1, -32767, 32767);
        }
        to[i] = (int16_t)value;
        seen |= eft_magnitude(value);
    }
    return seen;
}

#endif

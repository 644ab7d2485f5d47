/** From int32 sums to a gradient. Not part of the contract. */
#ifndef EFT_GRADIENT_H
#define EFT_GRADIENT_H

#include "eft_dsp.h"
#include "eft_internal.h"

/** How far a gradient is shifted right as it becomes an operand: in [0, 30], as the bits are at most 15, and so are the operand bits. */
static inline int32_t eft_operand_shift(const eft_input_grad *constants, int32_t g_bits)
{
    return 15 - (constants->operand_bits - g_bits);
}

/** rsh(sum, shift) held to 16 bits, for shifts in [1, 30] and sums that leave room for a 1. */
static inline int32_t eft_half_up(int32_t sum, int32_t shift)
{
    /* (v + 2^(n-1)) >> n is ((v >> (n-1)) + 1) >> 1. */
    const int32_t doubled = (sum >> (shift - 1)) + 1;
#if EFT_DSP
    int32_t value;
    __asm("ssat %0, #16, %1, asr #1" : "=r"(value) : "r"(doubled));
    return value < -32767 ? -32767 : value;
#else
    return eft_clamp(doubled >> 1, -32767, 32767);
#endif
}

/**
 * Elements [index, index + count) of a gradient from their sums: rsh(sum, shift) held to 16 bits, 0 where the mask is 0.
 *
 * @param[out] to  Where they go
 * @return     All bits of all magnitudes
 */
static EFT_OUT_OF_LINE uint32_t eft_store_gradient(const int32_t *sums, int32_t count, int32_t shift, const uint8_t *mask,
                                                   int32_t index, int16_t *to)
{
    uint32_t seen = 0;
    if (shift < 1 || shift > 30) {
        for (int32_t i = 0; i < count; i++) {
            const int32_t value =
                eft_passes(mask, index + i) ? (int32_t)eft_clamp64(eft_rsh(sums[i], shift), -32767, 32767) : 0;
            to[i] = (int16_t)value;
            seen |= eft_magnitude(value);
        }
        return seen;
    }
    while (count > 0) {
        /* As far as one byte of the mask goes. */
        const int32_t rest = 8 - (index & 7);
        const int32_t n = rest < count ? rest : count;
        const int16_t *const end = to + n;
        uint32_t passes = mask != NULL ? (uint32_t)mask[index >> 3] >> (index & 7) : 255U;
        while (to != end) {
            int32_t value = 0;
            if ((passes & 1U) != 0U) {
                value = eft_half_up(*sums, shift);
                seen |= eft_magnitude(value);
            }
            *to++ = (int16_t)value;
            passes >>= 1;
            sums++;
        }
        index += n;
        count -= n;
    }
    return seen;
}

#endif

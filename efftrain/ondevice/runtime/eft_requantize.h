/** From int32 sums to activations and their mask. Not part of the contract. */
#ifndef EFT_REQUANTIZE_H
#define EFT_REQUANTIZE_H

#include "eft_dsp.h"
#include "eft_internal.h"

/** Twice what is wanted, for shifts below 33, which are rare; what exceeds +-2^20 is held there. */
static EFT_OUT_OF_LINE int32_t eft_doubled_far(int32_t sum, int32_t multiplier, int32_t shift, int32_t round)
{
    return 2 * (int32_t)eft_clamp64(eft_rsh((int64_t)sum * multiplier, shift), -1048576, 1048576) + round;
}

/**
 * 2 * (rsh(sum * multiplier, shift) + zero_point), its lowest bit any.
 *
 * For shifts of 33 and more the rounding term touches the upper word of the product alone, and (u + 2^(n-1)) >> n is
 * ((u >> (n-1)) + 1) >> 1; the last shift is the caller's.
 *
 * @param[in] round  1 + 2 * zero_point
 */
static inline int32_t eft_doubled(int32_t sum, int32_t multiplier, int32_t shift, int32_t round)
{
    if (shift < 33) {
        return eft_doubled_far(sum, multiplier, shift, round);
    }
    return ((int32_t)(((int64_t)sum * multiplier) >> 32) >> (shift - 33)) + round;
}

/** doubled / 2, held to [minimum, 127]. */
static inline int32_t eft_stored(int32_t doubled, int32_t minimum)
{
#if EFT_DSP
    int32_t value;
    __asm("ssat %0, #8, %1, asr #1" : "=r"(value) : "r"(doubled));
    return minimum == -128 || value >= minimum ? value : minimum;
#else
    return eft_clamp(doubled >> 1, minimum, 127);
#endif
}

/** Twice bits, and 1 more if value <= limit. */
static inline uint32_t eft_push_bit(uint32_t bits, uint32_t value, uint32_t limit)
{
#if EFT_DSP
    /* The comparison's carry goes in as the lowest bit. */
    __asm("cmp %1, %2\n\tadc %0, %0, %0" : "+r"(bits) : "r"(limit), "r"(value) : "cc");
    return bits;
#else
    return 2U * bits + (value <= limit ? 1U : 0U);
#endif
}

/** Bits of the mask from index on, from what eft_doubled gave for count channels, each with both pixels. */
static inline void eft_mask_channels(const int32_t *doubled, int32_t count, int32_t lowest, uint8_t *mask, int32_t index)
{
    const int32_t low = 2 * lowest;
    const uint32_t range = (uint32_t)(255 - low);
    while (count > 0) {
        const int32_t n = count < 8 ? count : 8;
        uint32_t passes = 0;
        for (int32_t j = n; j > 0; j--) {
            passes = eft_push_bit(passes, (uint32_t)(doubled[2 * j - 2] - low), range);
        }
        eft_set_bits(mask, index, n, passes);
        doubled += 2 * n;
        index += n;
        count -= n;
    }
}

/** Channels of the first pixel. What eft_doubled gives stays where the sums were. */
static inline void eft_requantize_one(int32_t *sums, int32_t count, const int32_t *multiplier, const int8_t *shift,
                                      int32_t round, int32_t minimum, int8_t *y)
{
    const int8_t *const end = y + count;
    while (y != end) {
        const int32_t doubled = eft_doubled(*sums, *multiplier++, *shift++, round);
        *sums = doubled;
        *y++ = (int8_t)eft_stored(doubled, minimum);
        sums += 2;
    }
}

/** Channels of two pixels, whose outputs are y and z. */
static inline void eft_requantize_both(int32_t *sums, int32_t count, const int32_t *multiplier, const int8_t *shift,
                                       int32_t round, int32_t minimum, int8_t *y, int8_t *z)
{
    const int32_t *const end = sums + 2 * count;
    while (sums != end) {
        const int32_t m = *multiplier++;
        const int32_t s = *shift++;
        const int32_t first = eft_doubled(sums[0], m, s, round);
        const int32_t second = eft_doubled(sums[1], m, s, round);
        *y++ = (int8_t)eft_stored(first, minimum);
        *z++ = (int8_t)eft_stored(second, minimum);
        sums[0] = first;
        sums[1] = second;
        sums += 2;
    }
}

/**
 * Channels [o, o + count) of one or two pixels.
 *
 * @param      sums   Of all channels, each with both pixels, the second not used if there is one. Scratch afterwards
 * @param[out] y      Of pixel p from y + p * pixel_step on
 * @param[out] mask   NULL, or of the whole tensor
 * @param[in]  index  Element of the whole tensor that y[0] is
 */
static EFT_OUT_OF_LINE void eft_requantize_pixels(int32_t *sums, int32_t pixels, int32_t count, const eft_requantize *out,
                                                  int32_t o, int8_t *y, int32_t pixel_step, uint8_t *mask, int32_t index)
{
    const int32_t *const multiplier = out->factors.multiplier + o;
    const int8_t *const shift = out->factors.shift + o;
    const int32_t round = 1 + 2 * out->zero_point;
    if (pixels == 1 && out->minimum == -128) {
        eft_requantize_one(sums, count, multiplier, shift, round, -128, y);
    } else if (pixels == 1) {
        eft_requantize_one(sums, count, multiplier, shift, round, out->minimum, y);
    } else if (out->minimum == -128) {
        eft_requantize_both(sums, count, multiplier, shift, round, -128, y, y + pixel_step);
    } else {
        eft_requantize_both(sums, count, multiplier, shift, round, out->minimum, y, y + pixel_step);
    }
    if (mask != NULL) {
        eft_mask_channels(sums, count, out->pass_minimum, mask, index);
        if (pixels == 2) {
            eft_mask_channels(sums + 1, count, out->pass_minimum, mask, index + pixel_step);
        }
    }
}

#endif

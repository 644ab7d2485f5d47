/** From int32 sums to activations and their mask with AVX2. Not part of the contract. */
#ifndef EFT_AVX2_REQUANTIZE_H
#define EFT_AVX2_REQUANTIZE_H

#include "eft_avx2.h"
#include "eft_requantize.h"

#if EFT_AVX2

/** What the channels of one tile take. */
typedef struct {
    int32_t bias[EFT_LANES], multiplier[EFT_LANES], shift[EFT_LANES]; /**< Shifts less 33 */
    int far;                                                          /**< Whether some shift is smaller */
} eft_lane_factors;

static inline eft_lane_factors eft_factors_of(const eft_requantize *out, const int32_t *bias, int32_t first, int32_t count)
{
    eft_lane_factors found;
    found.far = 0;
    for (int32_t i = 0; i < EFT_LANES; i += 8) {
        const int32_t at = first + eft_least(i, count);
        const int32_t some = count - eft_least(i, count);
        const __m256i given = _mm256_cvtepi8_epi32(eft_some_bytes(out->factors.shift + at, some));
        const __m256i shift = _mm256_sub_epi32(given, _mm256_set1_epi32(33));
        const uint32_t lanes = (uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(shift));
        eft_store256(found.bias + i, eft_some_words(bias + at, some));
        eft_store256(found.multiplier + i, eft_some_words(out->factors.multiplier + at, some));
        eft_store256(found.shift + i, shift);
        found.far |= (lanes & (some < 8 ? (1U << (uint32_t)some) - 1U : 255U)) != 0U;
    }
    return found;
}

/** Channels of one pixel from their sums, biases included. */
static inline void eft_requantize_lanes(const int32_t *sums, const eft_lane_factors *factors, const eft_requantize *out,
                                        int32_t count, int8_t *y, uint8_t *mask, int32_t index)
{
    const int32_t round = 1 + 2 * out->zero_point;
    if (factors->far) {
        uint32_t bits = 0;
        for (int32_t i = 0; i < count; i++) {
            const int32_t doubled = eft_doubled(sums[i], factors->multiplier[i], factors->shift[i] + 33, round);
            const int32_t value = doubled >> 1;
            y[i] = (int8_t)eft_stored(doubled, out->minimum);
            bits |= value >= out->pass_minimum && value <= 127 ? 1U << (uint32_t)i : 0U;
        }
        if (mask != NULL) {
            eft_set_lanes(mask, index, count, bits);
        }
        return;
    }
    __m256i values[2];
    for (int32_t i = 0; i < 2; i++) {
        const __m256i upper = eft_upper_product(eft_load256(sums + 8 * i), eft_load256(factors->multiplier + 8 * i));
        const __m256i shifted = _mm256_srav_epi32(upper, eft_load256(factors->shift + 8 * i));
        values[i] = _mm256_srai_epi32(_mm256_add_epi32(shifted, _mm256_set1_epi32(round)), 1);
    }
    const uint32_t passes = eft_store_activations(eft_narrow(values[0], values[1]), out->minimum, out->pass_minimum, count, y);
    if (mask != NULL) {
        eft_set_lanes(mask, index, count, passes);
    }
}

#endif

#endif

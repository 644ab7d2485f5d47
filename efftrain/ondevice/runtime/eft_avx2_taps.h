/** Sums over the places of a depthwise kernel with AVX2. Not part of the contract. */
#ifndef EFT_AVX2_TAPS_H
#define EFT_AVX2_TAPS_H

#include "eft_avx2.h"

#if EFT_AVX2

/** Most places of a kernel, one more for an odd one of each phase. */
#define EFT_TAPS 128

/** int16 of all weights of one call. */
#define EFT_TAP_WEIGHTS 32768

/** Weights of channels [c, c + EFT_LANES) at one place of the kernel, as int16; zeros without a place or beyond the channels. */
static inline __m256i eft_tap_weights(const eft_weights *weights, int32_t channels, int32_t place, int32_t c)
{
    if (place < 0) {
        return _mm256_setzero_si256();
    }
    return _mm256_cvtepi8_epi16(eft_weight_lanes(weights, channels, place, c, eft_least(EFT_LANES, channels - c)));
}

/** Weights of two places as eft_tap_sums takes them: 2 * EFT_LANES int16 for each EFT_LANES channels. */
static inline void eft_pack_taps(const eft_weights *weights, int32_t channels, int32_t c, int32_t first, int32_t second,
                                 int16_t *to)
{
    const __m256i a = eft_tap_weights(weights, channels, first, c);
    const __m256i b = eft_tap_weights(weights, channels, second, c);
    eft_store256(to, _mm256_unpacklo_epi16(a, b));
    eft_store256(to + EFT_LANES, _mm256_unpackhi_epi16(a, b));
}

/** Sums of EFT_LANES channels over pairs of places, of which offsets are the distances from at. */
static inline void eft_tap_sums(const int16_t *at, const int32_t *offsets, int32_t pairs, const int16_t *weights,
                                const int32_t *bias, int32_t *sums)
{
    __m256i low = _mm256_setzero_si256(), high = low;
    for (int32_t pair = 0; pair < pairs; pair++) {
        const __m256i a = eft_load256(at + offsets[2 * pair]);
        const __m256i b = eft_load256(at + offsets[2 * pair + 1]);
        low = _mm256_add_epi32(low, _mm256_madd_epi16(_mm256_unpacklo_epi16(a, b), eft_load256(weights)));
        high = _mm256_add_epi32(high, _mm256_madd_epi16(_mm256_unpackhi_epi16(a, b), eft_load256(weights + EFT_LANES)));
        weights += 2 * EFT_LANES;
    }
    const __m256i first = _mm256_permute2x128_si256(low, high, 0x20), second = _mm256_permute2x128_si256(low, high, 0x31);
    eft_store256(sums, _mm256_add_epi32(first, eft_load256(bias)));
    eft_store256(sums + 8, _mm256_add_epi32(second, eft_load256(bias + 8)));
}

#endif

#endif

/** Kernels that go over the elements of a tensor with AVX2, as far as whole lanes go. Not part of the contract. */
#ifndef EFT_AVX2_ELEMENTS_H
#define EFT_AVX2_ELEMENTS_H

#include "eft_avx2.h"

#if EFT_AVX2

/** Sixteen gradients, 0 where the mask is 0. */
static inline __m256i eft_masked(__m256i values, const uint8_t *mask, int32_t index)
{
    const __m256i bit = _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, -32768);
    if (mask == NULL) {
        return values;
    }
    const __m256i bits = _mm256_set1_epi16((int16_t)eft_lanes_that_pass(mask, index, EFT_LANES));
    return _mm256_and_si256(values, _mm256_cmpeq_epi16(_mm256_and_si256(bits, bit), bit));
}

/** Sums of EFT_LANES channels over all pixels. */
static inline void eft_sum_gradients(const int16_t *g, int32_t pixels, int32_t channels, int32_t cut, int32_t *sums)
{
    __m256i low = _mm256_setzero_si256(), high = low;
    const __m256i one = _mm256_set1_epi16(1);
    for (int32_t p = 0; p < pixels; p += 2) {
        const __m256i a = eft_cut_gradients(eft_load256(g), cut);
        const __m256i b = p + 1 < pixels ? eft_cut_gradients(eft_load256(g + channels), cut) : _mm256_setzero_si256();
        low = _mm256_add_epi32(low, _mm256_madd_epi16(_mm256_unpacklo_epi16(a, b), one));
        high = _mm256_add_epi32(high, _mm256_madd_epi16(_mm256_unpackhi_epi16(a, b), one));
        g += 2 * channels;
    }
    eft_store256(sums, _mm256_permute2x128_si256(low, high, 0x20));
    eft_store256(sums + 8, _mm256_permute2x128_si256(low, high, 0x31));
}

/** Sixteen elements of eft_gradient_sum_s16 before the mask; shift_b is at least 17, or b is NULL. */
static inline __m256i eft_sum_of_gradients(const int16_t *a, const int16_t *b, int32_t shift_a, int32_t multiplier, int32_t shift_b)
{
    __m256i sums[2];
    for (int32_t i = 0; i < 2; i++) {
        __m256i sum = _mm256_setzero_si256();
        if (a != NULL && shift_a <= 16) {
            sum = _mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i *)(const void *)(a + 8 * i)));
            if (shift_a > 0) {
                sum = _mm256_sra_epi32(_mm256_add_epi32(sum, _mm256_set1_epi32(1 << (shift_a - 1))), _mm_cvtsi32_si128(shift_a));
            } else {
                sum = _mm256_sll_epi32(sum, _mm_cvtsi32_si128(-shift_a));
            }
        }
        if (b != NULL) {
            const __m256i value = _mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i *)(const void *)(b + 8 * i)));
            const __m256i upper = eft_upper_product(_mm256_slli_epi32(value, 16), _mm256_set1_epi32(multiplier));
            const __m256i shifted = _mm256_sra_epi32(upper, _mm_cvtsi32_si128(shift_b - 17));
            sum = _mm256_add_epi32(sum, _mm256_srai_epi32(_mm256_add_epi32(shifted, _mm256_set1_epi32(1)), 1));
        }
        sums[i] = sum;
    }
    return _mm256_max_epi16(eft_narrow(sums[0], sums[1]), _mm256_set1_epi16(-32767));
}

#endif

#endif

#include "eft_avx2.h"
#include "eft_internal.h"

void eft_add_s8(const int8_t *x, const int8_t *z, const eft_sum *sum, int32_t count, int8_t *y, uint8_t *mask)
{
    const int32_t x_multiplier = sum->x_multiplier;
    const int32_t z_multiplier = sum->z_multiplier;
    const int32_t shift = sum->shift;
    /* All that is added to the products, below 2^30 with them, so that the rounding term has room. */
    const int32_t constant = (1 << (shift - 1)) - sum->x_zero_point * x_multiplier - sum->z_zero_point * z_multiplier;
    const int32_t zero_point = sum->zero_point;
    const int32_t minimum = sum->minimum;
    const int32_t lowest = sum->pass_minimum;
    const uint32_t range = (uint32_t)(127 - lowest);
    const int8_t *const end = x + count;
#if EFT_AVX2
    for (; end - x >= EFT_LANES; x += EFT_LANES) {
        __m256i values[2];
        for (int32_t i = 0; i < 2; i++) {
            const __m256i a = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)(x + 8 * i)));
            const __m256i b = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)(z + 8 * i)));
            __m256i value = _mm256_mullo_epi32(a, _mm256_set1_epi32(x_multiplier));
            value = _mm256_add_epi32(value, _mm256_mullo_epi32(b, _mm256_set1_epi32(z_multiplier)));
            value = _mm256_sra_epi32(_mm256_add_epi32(value, _mm256_set1_epi32(constant)), _mm_cvtsi32_si128(shift));
            values[i] = _mm256_add_epi32(value, _mm256_set1_epi32(zero_point));
        }
        const uint32_t passes = eft_store_activations(eft_narrow(values[0], values[1]), minimum, lowest, EFT_LANES, y);
        if (mask != NULL) {
            *mask++ = (uint8_t)(passes & 255U);
            *mask++ = (uint8_t)(passes >> 8);
        }
        y += EFT_LANES;
        z += EFT_LANES;
    }
#endif
    while (x != end) {
        const int8_t *const part_end = end - x < 8 ? end : x + 8;
        uint32_t passes = 0;
        uint32_t bit = 1;
        while (x != part_end) {
            const int32_t value = ((*x++ * x_multiplier + constant + *z++ * z_multiplier) >> shift) + zero_point;
            *y++ = (int8_t)eft_clamp(value, minimum, 127);
            passes |= (uint32_t)(value - lowest) <= range ? bit : 0U;
            bit <<= 1;
        }
        if (mask != NULL) {
            *mask++ = (uint8_t)passes;
        }
    }
}

#include "eft_avx2_elements.h"
#include "eft_internal.h"

int32_t eft_gradient_sum_s16(const eft_gradient *a, const eft_gradient *b, int32_t multiplier, int32_t shift, int32_t count,
                             const uint8_t *mask, int16_t *g, int32_t *exponent)
{
    const int has_b = b != NULL && b->bits > 0;
    int32_t common = a->exponent;
    if (b != NULL && (a->bits > 0 || has_b)) {
        const int32_t top_a = a->exponent + a->bits;
        const int32_t top_b = has_b ? b->exponent + b->bits + 31 - shift : top_a;
        common = (a->bits > 0 && top_a > top_b ? top_a : top_b) - 14;
    }
    const int32_t shift_a = common - a->exponent;
    const int32_t shift_b = has_b ? common - b->exponent + shift : 0;
    uint32_t seen = 0;
    int32_t i = 0;
#if EFT_AVX2
    __m256i lanes = _mm256_setzero_si256();
    for (; i + EFT_LANES <= count && (!has_b || shift_b >= 17); i += EFT_LANES) {
        const int16_t *const first = a->bits > 0 ? a->g + i : NULL;
        const int16_t *const second = has_b ? b->g + i : NULL;
        const __m256i sums = eft_masked(eft_sum_of_gradients(first, second, shift_a, multiplier, shift_b), mask, i);
        eft_store256(g + i, sums);
        lanes = _mm256_or_si256(lanes, _mm256_abs_epi16(sums));
    }
    seen = eft_all_bits(lanes);
#endif
    for (; i < count; i++) {
        int64_t value = 0;
        if (eft_passes(mask, i)) {
            value = a->bits > 0 ? eft_rsh(a->g[i], shift_a) : 0;
            value += has_b ? eft_rsh((int64_t)b->g[i] * multiplier, shift_b) : 0;
            value = eft_clamp64(value, -32767, 32767);
        }
        g[i] = (int16_t)value;
        seen |= eft_magnitude((int32_t)value);
    }
    *exponent = common;
    return eft_bit_length(seen);
}

#include "eft_avx2_elements.h"
#include "eft_internal.h"

int32_t eft_global_average_grad_s16(const int16_t *g, int32_t pixels, int32_t channels, const uint8_t *x_mask, int16_t *gx)
{
    uint32_t seen = 0;
    int32_t index = 0;
#if EFT_AVX2
    __m256i lanes = _mm256_setzero_si256();
#endif
    for (int32_t p = 0; p < pixels; p++) {
        int32_t c = 0;
#if EFT_AVX2
        for (; c + EFT_LANES <= channels; c += EFT_LANES) {
            const __m256i values = eft_masked(eft_load256(g + c), x_mask, index);
            eft_store256(gx + index, values);
            lanes = _mm256_or_si256(lanes, _mm256_abs_epi16(values));
            index += EFT_LANES;
        }
#endif
        for (; c < channels; c++) {
            const int16_t value = eft_passes(x_mask, index) ? g[c] : (int16_t)0;
            gx[index] = value;
            seen |= eft_magnitude(value);
            index++;
        }
    }
#if EFT_AVX2
    seen |= eft_all_bits(lanes);
#endif
    return eft_bit_length(seen);
}

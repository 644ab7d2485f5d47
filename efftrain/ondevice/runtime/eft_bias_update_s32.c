#include "eft_avx2_elements.h"
#include "eft_internal.h"

/** Channels at a time. */
#if EFT_AVX2
#define BLOCK EFT_LANES
#else
#define BLOCK 4
#endif

/** Sums of count channels, BLOCK at most, over all pixels. */
static inline void sum_pixels(const int16_t *g, int32_t pixels, int32_t channels, int32_t count, int32_t cut, int32_t *sums)
{
    const int32_t half = cut > 0 ? 1 << (cut - 1) : 0;
#if EFT_AVX2
    if (count == BLOCK) {
        eft_sum_gradients(g, pixels, channels, cut, sums);
        return;
    }
#endif
    if (count == 4) {
        int32_t s0 = 0, s1 = 0, s2 = 0, s3 = 0;
        for (; pixels > 0; pixels--) {
            s0 += (g[0] + half) >> cut;
            s1 += (g[1] + half) >> cut;
            s2 += (g[2] + half) >> cut;
            s3 += (g[3] + half) >> cut;
            g += channels;
        }
        sums[0] = s0;
        sums[1] = s1;
        sums[2] = s2;
        sums[3] = s3;
        return;
    }
    for (int32_t j = 0; j < count; j++) {
        sums[j] = 0;
        for (int32_t p = 0; p < pixels; p++) {
            sums[j] += (g[p * channels + j] + half) >> cut;
        }
    }
}

void eft_bias_update_s32(const eft_gradient *gradient, int32_t pixels, int32_t channels, const eft_factors *rate,
                         const eft_optimizer *optimizer, int32_t *bias)
{
    const int32_t cut = eft_cut(gradient->bits, pixels);
    for (int32_t first = 0; first < channels; first += BLOCK) {
        const int32_t count = channels - first < BLOCK ? channels - first : BLOCK;
        int32_t sums[BLOCK];
        sum_pixels(gradient->g + first, pixels, channels, count, cut, sums);
        for (int32_t j = 0; j < count; j++) {
            const int32_t c = first + j;
            const int32_t shift = rate->shift[c] - (gradient->exponent + cut) - 16 + optimizer->lr_shift;
            const int64_t step = eft_optimized(optimizer, c, eft_rsh((int64_t)sums[j] * rate->multiplier[c], shift));
            bias[c] = (int32_t)eft_clamp64(bias[c] - ((step + 32768) >> 16), -EFT_BIAS_LIMIT, EFT_BIAS_LIMIT);
        }
    }
}

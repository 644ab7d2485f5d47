/** Gradients with respect to biases. Not part of the contract. */
#ifndef EFT_BIAS_SUMS_H
#define EFT_BIAS_SUMS_H

#include "eft_avx2_elements.h"
#include "eft_internal.h"

/** Channels at a time. */
#if EFT_AVX2
#define EFT_BIASES EFT_LANES
#else
#define EFT_BIASES 4
#endif

/** Sums of count channels, EFT_BIASES at most, over all pixels. */
static inline void eft_sum_pixels(const int16_t *g, int32_t pixels, int32_t channels, int32_t count, int32_t cut, int32_t *sums)
{
    const int32_t half = cut > 0 ? 1 << (cut - 1) : 0;
#if EFT_AVX2
    if (count == EFT_BIASES) {
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

#endif

#include "eft_internal.h"

void eft_bias_update_s32(const eft_gradient *gradient, int32_t pixels, int32_t channels, const eft_factors *rate,
                         int32_t lr_shift, int32_t *bias)
{
    const int32_t cut = eft_cut(gradient->bits, pixels);
    for (int32_t c = 0; c < channels; c++) {
        int32_t sum = 0;
        for (int32_t p = 0; p < pixels; p++) {
            sum += eft_rsh32(gradient->g[p * channels + c], cut);
        }
        const int32_t shift = rate->shift[c] - (gradient->exponent + cut) - 16 + lr_shift;
        const int64_t step = eft_rsh((int64_t)sum * rate->multiplier[c], shift);
        bias[c] = (int32_t)eft_clamp64(bias[c] - ((step + 32768) >> 16), -EFT_BIAS_LIMIT, EFT_BIAS_LIMIT);
    }
}

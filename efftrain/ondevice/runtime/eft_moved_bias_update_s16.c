#include "eft_bias_sums.h"

void eft_moved_bias_update_s16(const eft_gradient *gradient, int32_t pixels, int32_t channels, const eft_factors *rate,
                               const eft_optimizer *optimizer, const int8_t *shift, int16_t *moved)
{
    const int32_t cut = eft_cut(gradient->bits, pixels);
    for (int32_t first = 0; first < channels; first += EFT_BIASES) {
        const int32_t count = channels - first < EFT_BIASES ? channels - first : EFT_BIASES;
        int32_t sums[EFT_BIASES];
        eft_sum_pixels(gradient->g + first, pixels, channels, count, cut, sums);
        for (int32_t j = 0; j < count; j++) {
            const int32_t c = first + j;
            const int32_t right = rate->shift[c] - (gradient->exponent + cut) - 16 + optimizer->lr_shift;
            const int64_t step = eft_optimized(optimizer, c, eft_rsh((int64_t)sums[j] * rate->multiplier[c], right));
            const int32_t unit = 16 + eft_bias_unit(shift[c]);
            moved[c] = (int16_t)eft_clamp64(moved[c] - ((step + ((int64_t)1 << (unit - 1))) >> unit), -32768, 32767);
        }
    }
}

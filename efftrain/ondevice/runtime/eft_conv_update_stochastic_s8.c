#include "eft_avx2_update.h"

#if !EFT_AVX2
#include "eft_conv_weight_sums.h"
#endif

void eft_conv_update_stochastic_s8(const int8_t *x, int32_t x_zero_point, const eft_gradient *gradient,
                                   const eft_conv_shape *shape, const eft_factors *rate, const eft_optimizer *optimizer, uint32_t key,
                                   uint32_t first_index, int8_t *trained, int32_t trained_c)
{
#if EFT_AVX2
    eft_conv_update_avx2(x, x_zero_point, gradient, shape, rate, optimizer, key, first_index, trained, NULL, trained_c);
#else
    const int32_t cut = eft_cut(gradient->bits, shape->out_h * shape->out_w);
    const eft_runs runs = eft_runs_of(shape, trained_c);
    for (int32_t o = 0; o < shape->out_c; o++) {
        for (int32_t ky = 0; ky < shape->kernel_h; ky++) {
            const int32_t row = o * shape->kernel_h + ky;
            for (int32_t run = 0; run < runs.per_row; run++) {
                eft_seen seen = eft_seen_through(x, gradient->g, shape, ky, run);
                for (int32_t first = 0; first < runs.length; first += EFT_SUMS) {
                    const int32_t count = runs.length - first < EFT_SUMS ? runs.length - first : EFT_SUMS;
                    const int32_t index = row * shape->kernel_w * trained_c + run * trained_c + first;
                    int32_t sums[EFT_SUMS];
                    eft_conv_weight_sums(&seen, x_zero_point, cut, o, count, sums);
                    eft_move_stochastics(sums, count, rate, o, gradient->exponent + cut, optimizer, index, trained + index, key,
                                         first_index + (uint32_t)(row * shape->kernel_w * shape->in_c + run * shape->in_c + first));
                    seen.x += count;
                }
            }
        }
    }
#endif
}

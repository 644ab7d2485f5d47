#include "eft_conv_weight_sums.h"

void eft_conv_update_stochastic_s8(const int8_t *x, int32_t x_zero_point, const eft_gradient *gradient,
                                   const eft_conv_shape *shape, const eft_factors *rate, const eft_optimizer *optimizer, uint32_t key,
                                   uint32_t first_index, int8_t *trained, int32_t trained_c, int32_t *scratch)
{
    const int32_t cut = eft_cut(gradient->bits, shape->out_h * shape->out_w);
    const eft_runs runs = eft_runs_of(shape, trained_c);
    int32_t index = 0;
    (void)scratch;
    for (int32_t o = 0; o < shape->out_c; o++) {
        const int32_t shift = rate->shift[o] - (gradient->exponent + cut) - 16 + optimizer->lr_shift;
        for (int32_t ky = 0; ky < shape->kernel_h; ky++) {
            for (int32_t run = 0; run < runs.per_row; run++) {
                const int32_t tap = (o * shape->kernel_h + ky) * shape->kernel_w + run;
                const uint32_t first_of_run = first_index + (uint32_t)(tap * shape->in_c);
                eft_seen seen = eft_seen_through(x, gradient->g, shape, ky, run);
                for (int32_t first = 0; first < runs.length; first += EFT_SUMS) {
                    const int32_t count = runs.length - first < EFT_SUMS ? runs.length - first : EFT_SUMS;
                    int32_t sums[EFT_SUMS];
                    eft_conv_weight_sums(&seen, x_zero_point, cut, o, count, sums);
                    for (int32_t i = 0; i < count; i++) {
                        const int64_t whole = eft_rsh((int64_t)sums[i] * rate->multiplier[o], shift);
                        const int64_t step = eft_optimized(optimizer, index, whole);
                        eft_move_stochastic(trained + index, step, key, first_of_run + (uint32_t)(first + i));
                        index++;
                    }
                    seen.x += count;
                }
            }
        }
    }
}

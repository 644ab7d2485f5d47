#include "eft_conv_weight_sums.h"

void eft_conv_update_master_s8(const int8_t *x, int32_t x_zero_point, const eft_gradient *gradient, const eft_conv_shape *shape,
                               const eft_factors *rate, const eft_optimizer *optimizer, int8_t *trained, int8_t *residual, int32_t trained_c,
                               int32_t *scratch)
{
    const int32_t cut = eft_cut(gradient->bits, shape->out_h * shape->out_w);
    const eft_runs runs = eft_runs_of(shape, trained_c);
    int32_t index = 0;
    (void)scratch;
    for (int32_t o = 0; o < shape->out_c; o++) {
        const int32_t shift = rate->shift[o] - (gradient->exponent + cut) - 16 + optimizer->lr_shift;
        for (int32_t ky = 0; ky < shape->kernel_h; ky++) {
            for (int32_t run = 0; run < runs.per_row; run++) {
                eft_seen seen = eft_seen_through(x, gradient->g, shape, ky, run);
                for (int32_t first = 0; first < runs.length; first += EFT_SUMS) {
                    const int32_t count = runs.length - first < EFT_SUMS ? runs.length - first : EFT_SUMS;
                    int32_t sums[EFT_SUMS];
                    eft_conv_weight_sums(&seen, x_zero_point, cut, o, count, sums);
                    for (int32_t i = 0; i < count; i++) {
                        const int64_t whole = eft_rsh((int64_t)sums[i] * rate->multiplier[o], shift);
                        const int64_t step = eft_optimized(optimizer, index, whole);
                        eft_move_master(trained + index, residual + index, step);
                        index++;
                    }
                    seen.x += count;
                }
            }
        }
    }
}

#include "eft_conv_weight_sums.h"

void eft_conv_update_master_s8(const int8_t *x, int32_t x_zero_point, const eft_gradient *gradient, const eft_conv_shape *shape,
                               const eft_factors *rate, const eft_optimizer *optimizer, int8_t *trained, int8_t *residual, int32_t trained_c,
                               int32_t *scratch)
{
    const int32_t cut = eft_cut(gradient->bits, shape->out_h * shape->out_w);
    int32_t index = 0;
    for (int32_t o = 0; o < shape->out_c; o++) {
        const int32_t shift = rate->shift[o] - (gradient->exponent + cut) - 16 + optimizer->lr_shift;
        for (int32_t ky = 0; ky < shape->kernel_h; ky++) {
            for (int32_t kx = 0; kx < shape->kernel_w; kx++) {
                const eft_seen seen = eft_seen_through(x, gradient->g, shape, ky, kx);
                eft_conv_weight_sums(&seen, x_zero_point, cut, o, trained_c, scratch);
                for (int32_t i = 0; i < trained_c; i++) {
                    const int64_t step = eft_optimized(optimizer, index, eft_rsh((int64_t)scratch[i] * rate->multiplier[o], shift));
                    eft_move_master(trained + index, residual + index, step);
                    index++;
                }
            }
        }
    }
}

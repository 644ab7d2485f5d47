#include "eft_avx2_depthwise_update.h"
#include "eft_depthwise_weight_sums.h"

void eft_depthwise_update_master_s8(const int8_t *x, int32_t x_zero_point, const eft_gradient *gradient,
                                    const eft_conv_shape *shape, const eft_factors *rate, const eft_optimizer *optimizer, int8_t *trained,
                                    int8_t *residual, int32_t trained_c, int32_t *scratch)
{
#if EFT_AVX2
    if (eft_depthwise_update_avx2(x, x_zero_point, gradient, shape, rate, optimizer, 0, 0, trained, residual, trained_c)) {
        return;
    }
#endif
    const int32_t cut = eft_cut(gradient->bits, shape->out_h * shape->out_w);
    int32_t index = 0;
    for (int32_t ky = 0; ky < shape->kernel_h; ky++) {
        for (int32_t kx = 0; kx < shape->kernel_w; kx++) {
            const eft_seen seen = eft_seen_through(x, gradient->g, shape, ky, kx);
            eft_depthwise_weight_sums(&seen, x_zero_point, cut, trained_c, scratch);
            for (int32_t c = 0; c < trained_c; c++) {
                const int32_t shift = rate->shift[c] - (gradient->exponent + cut) - 16 + optimizer->lr_shift;
                const int64_t step = eft_optimized(optimizer, index, eft_rsh((int64_t)scratch[c] * rate->multiplier[c], shift));
                eft_move_master(trained + index, residual + index, step);
                index++;
            }
        }
    }
}

#include "eft_avx2_depthwise_update.h"
#include "eft_depthwise_weight_sums.h"

void eft_depthwise_update_stochastic_s8(const int8_t *x, int32_t x_zero_point, const eft_gradient *gradient,
                                        const eft_conv_shape *shape, const eft_factors *rate, const eft_optimizer *optimizer, uint32_t key,
                                        uint32_t first_index, int8_t *trained, int32_t trained_c, int32_t *scratch)
{
#if EFT_AVX2
    if (eft_depthwise_update_avx2(x, x_zero_point, gradient, shape, rate, optimizer, key, first_index, trained, NULL, trained_c)) {
        return;
    }
#endif
    const int32_t cut = eft_cut(gradient->bits, shape->out_h * shape->out_w);
    int32_t index = 0;
    for (int32_t ky = 0; ky < shape->kernel_h; ky++) {
        for (int32_t kx = 0; kx < shape->kernel_w; kx++) {
            const uint32_t first = first_index + (uint32_t)((ky * shape->kernel_w + kx) * shape->in_c);
            const eft_seen seen = eft_seen_through(x, gradient->g, shape, ky, kx);
            eft_depthwise_weight_sums(&seen, x_zero_point, cut, trained_c, scratch);
            for (int32_t c = 0; c < trained_c; c++) {
                const int32_t shift = rate->shift[c] - (gradient->exponent + cut) - 16 + optimizer->lr_shift;
                const int64_t step = eft_optimized(optimizer, index, eft_rsh((int64_t)scratch[c] * rate->multiplier[c], shift));
                eft_move_stochastic(trained + index, step, key, first + (uint32_t)c);
                index++;
            }
        }
    }
}

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
    eft_depthwise_update_master(x, x_zero_point, gradient, shape, rate, optimizer, trained, residual, trained_c, trained_c,
                                scratch);
}

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
    eft_depthwise_update_stochastic(x, x_zero_point, gradient, shape, rate, optimizer, key, first_index, trained, trained_c,
                                    trained_c, scratch);
}

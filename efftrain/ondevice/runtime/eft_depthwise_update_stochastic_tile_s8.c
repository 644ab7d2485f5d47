#include "eft_depthwise_weight_sums.h"

void eft_depthwise_update_stochastic_tile_s8(const int8_t *x, int32_t x_zero_point, const eft_gradient *gradient,
                                             const eft_conv_shape *shape, const eft_factors *rate, const eft_optimizer *optimizer,
                                             uint32_t key, uint32_t first_index, int8_t *trained, int32_t trained_c, int32_t count,
                                             int32_t *scratch)
{
    eft_depthwise_update_stochastic(x, x_zero_point, gradient, shape, rate, optimizer, key, first_index, trained, trained_c, count,
                                    scratch);
}

#include "eft_internal.h"

void eft_head_s8(const int8_t *x, const eft_conv_shape *shape, int32_t x_zero_point, const eft_weights *weights,
                 const int32_t *bias, const eft_factors *factors, int16_t *logits)
{
    for (int32_t o = 0; o < shape->out_c; o++) {
        const int32_t sum = bias[o] + eft_conv_sum(x, shape, shape->in_h, x_zero_point, weights, 0, 0, o);
        const int64_t value = eft_rsh((int64_t)sum * factors->multiplier[o], factors->shift[o]);
        logits[o] = (int16_t)eft_clamp64(value, -32768, 32767);
    }
}

#include "eft_internal.h"

void eft_conv_s8(const int8_t *x, const eft_conv_shape *shape, int32_t x_zero_point, const eft_weights *weights,
                 const int32_t *bias, const eft_requantize *out, int8_t *y, uint8_t *mask)
{
    int32_t index = 0;
    uint32_t passes = 0;
    for (int32_t oy = 0; oy < shape->out_h; oy++) {
        for (int32_t ox = 0; ox < shape->out_w; ox++) {
            for (int32_t o = 0; o < shape->out_c; o++) {
                const int32_t sum = bias[o] + eft_conv_sum(x, shape, x_zero_point, weights, oy, ox, o);
                const int64_t value =
                    eft_rsh((int64_t)sum * out->factors.multiplier[o], out->factors.shift[o]) + out->zero_point;
                if (value >= out->pass_minimum && value <= 127) {
                    passes |= 1U << (index & 7);
                }
                y[index] = (int8_t)eft_clamp64(value, -128, 127);
                if (mask != NULL && (index & 7) == 7) {
                    mask[index >> 3] = (uint8_t)passes;
                    passes = 0;
                }
                index++;
            }
        }
    }
    if (mask != NULL && (index & 7) != 0) {
        mask[index >> 3] = (uint8_t)passes;
    }
}

#include "eft_internal.h"

void eft_conv_s8(const int8_t *x, const eft_conv_shape *shape, int32_t x_zero_point, const eft_weights *weights,
                 const int32_t *bias, const eft_requantize *out, const eft_rows *rows, int8_t *y, uint8_t *mask)
{
    const int32_t first = rows->first * shape->out_w * shape->out_c;
    int32_t index = first;
    for (int32_t oy = rows->first; oy < rows->first + rows->count; oy++) {
        for (int32_t ox = 0; ox < shape->out_w; ox++) {
            for (int32_t o = 0; o < shape->out_c; o++) {
                const int32_t sum = bias[o] + eft_conv_sum(x, shape, rows->ring, x_zero_point, weights, oy, ox, o);
                y[index - first] = eft_requantized(sum, out, o, mask, index);
                index++;
            }
        }
    }
}

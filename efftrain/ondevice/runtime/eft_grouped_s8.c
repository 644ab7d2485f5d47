#include "eft_conv_pixels.h"

void eft_grouped_s8(const int8_t *x, const eft_conv_shape *shape, int32_t groups, int32_t x_zero_point, const eft_weights *weights,
                    const int32_t *bias, const eft_requantize *out, const eft_rows *rows, int8_t *y, uint8_t *mask)
{
    const int32_t out_c = shape->out_c;
    const int32_t group_out = out_c / groups;
    eft_layer layer = eft_layer_of(x, shape, groups, weights, rows->ring, x_zero_point);
    int32_t index = rows->first * shape->out_w * out_c;
    for (int32_t oy = rows->first; oy < rows->first + rows->count; oy++) {
        for (int32_t ox = 0; ox < shape->out_w; ox += 2) {
            const int32_t pixels = shape->out_w - ox < 2 ? 1 : 2;
            layer.x = x;
            for (int32_t o = 0; o < out_c; o += group_out) {
                eft_conv_pixels(&layer, oy, ox, pixels, o, o + group_out, bias, out, y, mask, index);
                layer.x += layer.channels;
            }
            y += pixels * out_c;
            index += pixels * out_c;
        }
    }
}

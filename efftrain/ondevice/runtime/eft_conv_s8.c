#include "eft_avx2_conv.h"
#include "eft_conv_pixels.h"

void eft_conv_s8(const int8_t *x, const eft_conv_shape *shape, int32_t x_zero_point, const eft_weights *weights,
                 const int32_t *bias, const eft_requantize *out, const eft_rows *rows, int8_t *y, uint8_t *mask)
{
#if EFT_AVX2
    if (eft_conv_avx2(x, shape, x_zero_point, weights, bias, out, rows, y, mask)) {
        return;
    }
#endif
    const eft_layer layer = eft_layer_of(x, shape, 1, weights, rows->ring, x_zero_point);
    const int32_t out_c = shape->out_c;
    int32_t index = rows->first * shape->out_w * out_c;
    for (int32_t oy = rows->first; oy < rows->first + rows->count; oy++) {
        for (int32_t ox = 0; ox < shape->out_w; ox += 2) {
            const int32_t pixels = shape->out_w - ox < 2 ? 1 : 2;
            eft_conv_pixels(&layer, oy, ox, pixels, 0, out_c, bias, out, y, mask, index);
            y += pixels * out_c;
            index += pixels * out_c;
        }
    }
}

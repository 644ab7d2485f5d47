#include "eft_requantize.h"

/** The sum of one output element, without its bias. */
static int32_t depthwise_sum(const int8_t *x, const eft_conv_shape *s, int32_t ring, int32_t x_zero_point,
                             const eft_weights *weights, int32_t oy, int32_t ox, int32_t c)
{
    int32_t sum = 0;
    for (int32_t ky = 0; ky < s->kernel_h; ky++) {
        const int32_t iy = oy * s->stride_h - s->pad_h + ky;
        if (iy < 0 || iy >= s->in_h) {
            continue;
        }
        for (int32_t kx = 0; kx < s->kernel_w; kx++) {
            const int32_t ix = ox * s->stride_w - s->pad_w + kx;
            if (ix < 0 || ix >= s->in_w) {
                continue;
            }
            const int32_t value = (int32_t)eft_row(x, s, ring, iy)[ix * s->in_c + c] - x_zero_point;
            sum += value * eft_depthwise_weight(weights, s->in_c, ky * s->kernel_w + kx, c);
        }
    }
    return sum;
}

void eft_depthwise_s8(const int8_t *x, const eft_conv_shape *shape, int32_t x_zero_point, const eft_weights *weights,
                      const int32_t *bias, const eft_requantize *out, const eft_rows *rows, int8_t *y, uint8_t *mask)
{
    const int32_t channels = shape->in_c;
    int32_t index = rows->first * shape->out_w * channels;
    for (int32_t oy = rows->first; oy < rows->first + rows->count; oy++) {
        for (int32_t ox = 0; ox < shape->out_w; ox++) {
            for (int32_t c = 0; c < channels; c += 8) {
                const int32_t count = channels - c < 8 ? channels - c : 8;
                int32_t sums[16];
                for (int32_t j = 0; j < count; j++) {
                    sums[2 * j] = bias[c + j] + depthwise_sum(x, shape, rows->ring, x_zero_point, weights, oy, ox, c + j);
                }
                eft_requantize_pixels(sums, 1, count, out, c, y + c, 0, mask, index + c);
            }
            y += channels;
            index += channels;
        }
    }
}

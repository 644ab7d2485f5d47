#include "eft_internal.h"

/** Sum of one output channel over channels [first_c, first_c + channels) of the input, whose weights lie together. */
static int32_t part_sum(const int8_t *x, const eft_conv_shape *s, int32_t x_zero_point, const int8_t *w, int32_t first_c,
                        int32_t channels)
{
    int32_t sum = 0;
    for (int32_t iy = -s->pad_h; iy < s->kernel_h - s->pad_h; iy++) {
        for (int32_t ix = -s->pad_w; ix < s->kernel_w - s->pad_w; ix++) {
            if (iy >= 0 && iy < s->in_h && ix >= 0 && ix < s->in_w) {
                const int8_t *pixel = x + (iy * s->in_w + ix) * s->in_c + first_c;
                for (int32_t i = 0; i < channels; i++) {
                    sum += ((int32_t)pixel[i] - x_zero_point) * w[i];
                }
            }
            w += channels;
        }
    }
    return sum;
}

void eft_head_s8(const int8_t *x, const eft_conv_shape *shape, int32_t x_zero_point, const eft_weights *weights,
                 const int32_t *bias, const eft_factors *factors, int16_t *logits)
{
    const int32_t taps = shape->kernel_h * shape->kernel_w;
    const int32_t trained_c = weights->trained_c;
    const int32_t frozen_c = shape->in_c - trained_c;
    for (int32_t o = 0; o < shape->out_c; o++) {
        int32_t sum = bias[o];
        if (trained_c > 0) {
            sum += part_sum(x, shape, x_zero_point, weights->trained + o * taps * trained_c, 0, trained_c);
        }
        if (frozen_c > 0) {
            sum += part_sum(x, shape, x_zero_point, weights->frozen + o * taps * frozen_c, trained_c, frozen_c);
        }
        const int64_t value = eft_rsh((int64_t)sum * factors->multiplier[o], factors->shift[o]);
        logits[o] = (int16_t)eft_clamp64(value, -32768, 32767);
    }
}

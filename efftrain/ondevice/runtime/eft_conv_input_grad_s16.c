#include "eft_internal.h"

/** Add what one output pixel sends back through one tap of the kernel. */
static void add_tap(const int16_t *g, int32_t shift, const eft_conv_shape *s, const eft_weights *weights,
                    const int16_t *channel_scale, int32_t ky, int32_t kx, int32_t *sums)
{
    const int32_t trained_c = weights->trained_c;
    const int32_t frozen_c = s->in_c - trained_c;
    for (int32_t o = 0; o < s->out_c; o++) {
        const int32_t value = eft_rsh32((int32_t)g[o] * channel_scale[o], shift);
        const int32_t tap = (o * s->kernel_h + ky) * s->kernel_w + kx;
        if (value == 0) {
            continue;
        }
        if (trained_c > 0) {
            const int8_t *w = weights->trained + tap * trained_c;
            for (int32_t i = 0; i < trained_c; i++) {
                sums[i] += value * w[i];
            }
        }
        if (frozen_c > 0) {
            const int8_t *w = weights->frozen + tap * frozen_c;
            for (int32_t i = 0; i < frozen_c; i++) {
                sums[trained_c + i] += value * w[i];
            }
        }
    }
}

int32_t eft_conv_input_grad_s16(const int16_t *g, int32_t g_bits, const eft_conv_shape *shape, const eft_weights *weights,
                                const eft_input_grad *constants, const uint8_t *x_mask, int16_t *gx, int32_t *scratch)
{
    const eft_conv_shape *s = shape;
    /* In [0, 30]: the bits are at most 15, and so are the operand bits. */
    const int32_t shift = 15 - (constants->operand_bits - g_bits);
    uint32_t seen = 0;
    int32_t index = 0;
    for (int32_t iy = 0; iy < s->in_h; iy++) {
        for (int32_t ix = 0; ix < s->in_w; ix++) {
            for (int32_t i = 0; i < s->in_c; i++) {
                scratch[i] = 0;
            }
            for (int32_t ky = 0; ky < s->kernel_h; ky++) {
                const int32_t y = iy + s->pad_h - ky;
                if (y < 0 || y % s->stride_h != 0 || y / s->stride_h >= s->out_h) {
                    continue;
                }
                for (int32_t kx = 0; kx < s->kernel_w; kx++) {
                    const int32_t x = ix + s->pad_w - kx;
                    if (x < 0 || x % s->stride_w != 0 || x / s->stride_w >= s->out_w) {
                        continue;
                    }
                    const int32_t pixel = (y / s->stride_h) * s->out_w + x / s->stride_w;
                    add_tap(g + pixel * s->out_c, shift, s, weights, constants->channel_scale, ky, kx, scratch);
                }
            }
            for (int32_t i = 0; i < s->in_c; i++) {
                int64_t value = 0;
                if (eft_passes(x_mask, index)) {
                    value = eft_clamp64(eft_rsh(scratch[i], constants->shift), -32767, 32767);
                }
                gx[index] = (int16_t)value;
                seen |= eft_magnitude((int32_t)value);
                index++;
            }
        }
    }
    return eft_bit_length(seen);
}

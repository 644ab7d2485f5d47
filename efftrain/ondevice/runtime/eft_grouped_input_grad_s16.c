#include "eft_gradient.h"

/** Add what the weights of some input channels, part_c of every place of the kernel, give with one scaled gradient. */
static inline void add(int32_t h, const int8_t *w, int32_t part_c, int32_t *restrict sums)
{
    for (int32_t i = 0; i < part_c; i++) {
        sums[i] += h * w[i];
    }
}

int32_t eft_grouped_input_grad_s16(const int16_t *g, int32_t g_bits, const eft_conv_shape *shape, int32_t groups,
                                   const eft_weights *weights, const eft_input_grad *constants, const uint8_t *x_mask, int16_t *gx,
                                   int32_t *scratch)
{
    const eft_conv_shape *s = shape;
    const int32_t taps = s->kernel_h * s->kernel_w;
    const int32_t group_in = s->in_c / groups;
    const int32_t group_out = s->out_c / groups;
    const int32_t trained_c = weights->trained_c;
    const int32_t frozen_c = group_in - trained_c;
    const int32_t shift = eft_operand_shift(constants, g_bits);
    uint32_t seen = 0;
    int32_t index = 0;
    for (int32_t iy = 0; iy < s->in_h; iy++) {
        const int32_t y = iy + s->pad_h;
        const int32_t end_y = eft_end_output(y, s->stride_h, s->out_h);
        for (int32_t ix = 0; ix < s->in_w; ix++) {
            const int32_t x = ix + s->pad_w;
            const int32_t end_x = eft_end_output(x, s->stride_w, s->out_w);
            for (int32_t i = 0; i < s->in_c; i++) {
                scratch[i] = 0;
            }
            for (int32_t oy = eft_first_output(y, s->kernel_h, s->stride_h); oy < end_y; oy++) {
                for (int32_t ox = eft_first_output(x, s->kernel_w, s->stride_w); ox < end_x; ox++) {
                    const int16_t *const at = g + (oy * s->out_w + ox) * s->out_c;
                    int32_t tap = (y - oy * s->stride_h) * s->kernel_w + x - ox * s->stride_w;
                    int32_t *sums = scratch;
                    for (int32_t o = 0; o < s->out_c; sums += group_in) {
                        for (const int32_t end = o + group_out; o < end; o++) {
                            const int32_t h = eft_rsh32((int32_t)at[o] * constants->channel_scale[o], shift);
                            if (trained_c > 0) {
                                add(h, weights->trained + tap * trained_c, trained_c, sums);
                            }
                            if (frozen_c > 0) {
                                add(h, weights->frozen + tap * frozen_c, frozen_c, sums + trained_c);
                            }
                            tap += taps;
                        }
                    }
                }
            }
            seen |= eft_store_gradient(scratch, s->in_c, constants->shift, x_mask, index, gx + index);
            index += s->in_c;
        }
    }
    return eft_bit_length(seen);
}

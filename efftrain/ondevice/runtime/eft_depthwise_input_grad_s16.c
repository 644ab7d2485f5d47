#include "eft_internal.h"

int32_t eft_depthwise_input_grad_s16(const int16_t *g, int32_t g_bits, const eft_conv_shape *shape, const eft_weights *weights,
                                     const eft_input_grad *constants, const uint8_t *x_mask, int16_t *gx, int32_t *scratch)
{
    const eft_conv_shape *s = shape;
    const int32_t shift = 15 - (constants->operand_bits - g_bits);
    uint32_t seen = 0;
    int32_t index = 0;
    for (int32_t iy = 0; iy < s->in_h; iy++) {
        const int32_t first_y = eft_first_output(iy + s->pad_h, s->kernel_h, s->stride_h);
        const int32_t end_y = eft_end_output(iy + s->pad_h, s->stride_h, s->out_h);
        for (int32_t ix = 0; ix < s->in_w; ix++) {
            const int32_t first_x = eft_first_output(ix + s->pad_w, s->kernel_w, s->stride_w);
            const int32_t end_x = eft_end_output(ix + s->pad_w, s->stride_w, s->out_w);
            for (int32_t c = 0; c < s->in_c; c++) {
                scratch[c] = 0;
            }
            for (int32_t oy = first_y; oy < end_y; oy++) {
                for (int32_t ox = first_x; ox < end_x; ox++) {
                    const int16_t *value = g + (oy * s->out_w + ox) * s->out_c;
                    const int32_t ky = iy + s->pad_h - oy * s->stride_h;
                    const int32_t kx = ix + s->pad_w - ox * s->stride_w;
                    for (int32_t c = 0; c < s->in_c; c++) {
                        scratch[c] += eft_rsh32((int32_t)value[c] * constants->channel_scale[c], shift) *
                                      eft_depthwise_weight(weights, s->in_c, ky * s->kernel_w + kx, c);
                    }
                }
            }
            for (int32_t c = 0; c < s->in_c; c++) {
                int64_t value = 0;
                if (eft_passes(x_mask, index)) {
                    value = eft_clamp64(eft_rsh(scratch[c], constants->shift), -32767, 32767);
                }
                gx[index] = (int16_t)value;
                seen |= eft_magnitude((int32_t)value);
                index++;
            }
        }
    }
    return eft_bit_length(seen);
}

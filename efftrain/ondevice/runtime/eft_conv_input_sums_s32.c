#include "eft_conv_input_grad.h"

void eft_conv_input_sums_s32(const int16_t *g, int32_t g_bits, const eft_conv_shape *shape, const eft_weights *weights,
                             const eft_input_grad *constants, int32_t *sums)
{
    const eft_conv_shape *s = shape;
    const int32_t shift = eft_operand_shift(constants, g_bits);
    for (int32_t iy = 0; iy < s->in_h; iy++) {
        for (int32_t ix = 0; ix < s->in_w;) {
            const int32_t pixels = s->stride_w == 1 && ix + 1 < s->in_w ? 2 : 1;
            eft_add_window(g, shift, s, weights, constants->channel_scale, iy, ix, pixels, 0, s->in_c, sums);
            sums += pixels * s->in_c;
            ix += pixels;
        }
    }
}

#include "eft_internal.h"

/** Whether position (iy, ix) holds the largest value of the window of output (oy, ox), and none before it does. */
static int is_largest(const int8_t *x, const eft_conv_shape *s, int32_t oy, int32_t ox, int32_t iy, int32_t ix)
{
    const int32_t top = oy * s->stride_h - s->pad_h;
    const int32_t left = ox * s->stride_w - s->pad_w;
    const int32_t end_y = top + s->kernel_h > s->in_h ? s->in_h : top + s->kernel_h;
    const int32_t end_x = left + s->kernel_w > s->in_w ? s->in_w : left + s->kernel_w;
    const int8_t largest = x[(iy * s->in_w + ix) * s->in_c];
    for (int32_t y = top < 0 ? 0 : top; y < end_y; y++) {
        for (int32_t column = left < 0 ? 0 : left; column < end_x; column++) {
            const int8_t value = x[(y * s->in_w + column) * s->in_c];
            const int before = y < iy || (y == iy && column < ix);
            if (value > largest || (before && value == largest)) {
                return 0;
            }
        }
    }
    return 1;
}

int32_t eft_max_pool_grad_s16(const int16_t *g, const int8_t *x, const eft_conv_shape *shape, int32_t shift,
                              const uint8_t *x_mask, int16_t *gx)
{
    const eft_conv_shape *s = shape;
    uint32_t seen = 0;
    int32_t index = 0;
    for (int32_t iy = 0; iy < s->in_h; iy++) {
        const int32_t first_y = eft_first_output(iy + s->pad_h, s->kernel_h, s->stride_h);
        const int32_t end_y = eft_end_output(iy + s->pad_h, s->stride_h, s->out_h);
        for (int32_t ix = 0; ix < s->in_w; ix++) {
            const int32_t first_x = eft_first_output(ix + s->pad_w, s->kernel_w, s->stride_w);
            const int32_t end_x = eft_end_output(ix + s->pad_w, s->stride_w, s->out_w);
            for (int32_t c = 0; c < s->in_c; c++) {
                int32_t sum = 0;
                int64_t value = 0;
                for (int32_t oy = first_y; oy < end_y; oy++) {
                    for (int32_t ox = first_x; ox < end_x; ox++) {
                        if (is_largest(x + c, s, oy, ox, iy, ix)) {
                            sum += g[(oy * s->out_w + ox) * s->out_c + c];
                        }
                    }
                }
                if (eft_passes(x_mask, index)) {
                    value = eft_clamp64(eft_rsh(sum, shift), -32767, 32767);
                }
                gx[index] = (int16_t)value;
                seen |= eft_magnitude((int32_t)value);
                index++;
            }
        }
    }
    return eft_bit_length(seen);
}

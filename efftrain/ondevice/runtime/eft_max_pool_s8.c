#include "eft_internal.h"

void eft_max_pool_s8(const int8_t *x, const eft_conv_shape *shape, const eft_rows *rows, int8_t *y)
{
    const eft_conv_shape *s = shape;
    for (int32_t oy = rows->first; oy < rows->first + rows->count; oy++) {
        const int32_t top = oy * s->stride_h - s->pad_h;
        const int32_t first_y = top < 0 ? 0 : top;
        const int32_t end_y = top + s->kernel_h > s->in_h ? s->in_h : top + s->kernel_h;
        for (int32_t ox = 0; ox < s->out_w; ox++) {
            const int32_t left = ox * s->stride_w - s->pad_w;
            const int32_t first_x = left < 0 ? 0 : left;
            const int32_t end_x = left + s->kernel_w > s->in_w ? s->in_w : left + s->kernel_w;
            for (int32_t c = 0; c < s->out_c; c++) {
                int8_t largest = -128;
                for (int32_t iy = first_y; iy < end_y; iy++) {
                    const int8_t *row = eft_row(x, s, rows->ring, iy);
                    for (int32_t ix = first_x; ix < end_x; ix++) {
                        const int8_t value = row[ix * s->in_c + c];
                        largest = value > largest ? value : largest;
                    }
                }
                y[((oy - rows->first) * s->out_w + ox) * s->out_c + c] = largest;
            }
        }
    }
}

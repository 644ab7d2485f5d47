#include "eft_dsp.h"
#include "eft_requantize.h"

/** Channels at a time. */
#define BLOCK 16

/** What the kernel sees of one channel at one place of the output, or at two neighboring places that see as much. */
typedef struct {
    const int8_t *x;       /**< First row and column that lie on the input, channel 0 */
    const int8_t *end;     /**< Of the ring */
    int32_t ring_bytes, row_bytes;
    int32_t rows, columns; /**< How many lie on the input */
    int32_t first_tap;     /**< Where the first of them is in the kernel */
    int32_t channels;      /**< Of the input */
    int32_t next;          /**< Bytes to what the second place sees; 0 if there is none */
    int32_t kernel_w, zero_point;
} view;

static inline const int8_t *next_row(const view *v, const int8_t *row)
{
    row += v->row_bytes;
    return row >= v->end ? row - v->ring_bytes : row;
}

#if EFT_DSP

/** Sums of four channels: one product of each, for both places. */
static inline void add_four(const view *v, const int8_t *x, const int8_t *w, int32_t w_step, const int32_t *bias, int32_t *sums)
{
    const uint32_t plus = eft_minus(v->zero_point);
    const int32_t x_step = v->channels;
    const int32_t next = v->next;
    int32_t x0 = bias[0], x1 = bias[1], x2 = bias[2], x3 = bias[3];
    int32_t z0 = x0, z1 = x1, z2 = x2, z3 = x3;
    for (int32_t y = v->rows; y > 0; y--) {
        const int8_t *at = x;
        const int8_t *weight = w;
        for (int32_t column = v->columns; column > 0; column--) {
            const uint32_t w4 = eft_load4(weight);
            const uint32_t x4 = eft_load4(at);
            const uint32_t z4 = eft_load4(at + next);
            const uint32_t w_even = eft_even0(w4), w_odd = eft_odd0(w4);
            const uint32_t x_even = eft_even(x4, plus), x_odd = eft_odd(x4, plus);
            x0 = eft_smlabb(x_even, w_even, x0);
            x2 = eft_smlatt(x_even, w_even, x2);
            x1 = eft_smlabb(x_odd, w_odd, x1);
            x3 = eft_smlatt(x_odd, w_odd, x3);
            const uint32_t z_even = eft_even(z4, plus), z_odd = eft_odd(z4, plus);
            z0 = eft_smlabb(z_even, w_even, z0);
            z2 = eft_smlatt(z_even, w_even, z2);
            z1 = eft_smlabb(z_odd, w_odd, z1);
            z3 = eft_smlatt(z_odd, w_odd, z3);
            at += x_step;
            weight += w_step;
        }
        x = next_row(v, x);
        w += v->kernel_w * w_step;
    }
    sums[0] = x0;
    sums[1] = z0;
    sums[2] = x1;
    sums[3] = z1;
    sums[4] = x2;
    sums[5] = z2;
    sums[6] = x3;
    sums[7] = z3;
}

#endif

/** Sums of channels [c, c + count), each with both places, whose weights of one place of the kernel lie at w. */
static EFT_OUT_OF_LINE void add_channels(const view *v, int32_t c, const int8_t *w, int32_t w_step, int32_t count,
                                         const int32_t *bias, int32_t *sums)
{
    int32_t done = 0;
#if EFT_DSP
    for (; done + 4 <= count; done += 4) {
        add_four(v, v->x + c + done, w + v->first_tap * w_step + done, w_step, bias + done, sums + 2 * done);
    }
#endif
    if (done == count) {
        return;
    }
    for (int32_t place = 0; place < 2; place++) {
        const int8_t *row = v->x + c;
        const int8_t *weight = w + v->first_tap * w_step;
        int32_t totals[BLOCK];
        for (int32_t j = done; j < count; j++) {
            totals[j] = bias[j];
        }
        for (int32_t y = 0; y < v->rows; y++) {
            for (int32_t column = 0; column < v->columns; column++) {
                const int8_t *const at = row + place * v->next + column * v->channels;
                for (int32_t j = done; j < count; j++) {
                    totals[j] += ((int32_t)at[j] - v->zero_point) * weight[column * w_step + j];
                }
            }
            row = next_row(v, row);
            weight += v->kernel_w * w_step;
        }
        for (int32_t j = done; j < count; j++) {
            sums[2 * j + place] = totals[j];
        }
    }
}

void eft_depthwise_s8(const int8_t *x, const eft_conv_shape *shape, int32_t x_zero_point, const eft_weights *weights,
                      const int32_t *bias, const eft_requantize *out, const eft_rows *rows, int8_t *y, uint8_t *mask)
{
    const eft_conv_shape *s = shape;
    const int32_t channels = s->in_c;
    const int32_t trained_c = weights->trained_c;
    int32_t index = rows->first * s->out_w * channels;
    int32_t sums[2 * BLOCK];
    view v;
    v.row_bytes = s->in_w * channels;
    v.ring_bytes = rows->ring * v.row_bytes;
    v.end = x + v.ring_bytes;
    v.channels = channels;
    v.kernel_w = s->kernel_w;
    v.zero_point = x_zero_point;
    for (int32_t oy = rows->first; oy < rows->first + rows->count; oy++) {
        const int32_t top = oy * s->stride_h - s->pad_h;
        const int32_t first_y = top < 0 ? 0 : top;
        const int32_t end_y = top + s->kernel_h > s->in_h ? s->in_h : top + s->kernel_h;
        const int8_t *const row = x + (first_y % rows->ring) * v.row_bytes;
        v.rows = end_y > first_y ? end_y - first_y : 0;
        for (int32_t ox = 0; ox < s->out_w;) {
            const int32_t left = ox * s->stride_w - s->pad_w;
            const int32_t first_x = left < 0 ? 0 : left;
            const int32_t end_x = left + s->kernel_w > s->in_w ? s->in_w : left + s->kernel_w;
            const int pair = ox + 1 < s->out_w && left >= 0 && left + s->stride_w + s->kernel_w <= s->in_w;
            v.x = row + first_x * channels;
            v.columns = end_x > first_x ? end_x - first_x : 0;
            v.first_tap = (first_y - top) * s->kernel_w + first_x - left;
            v.next = pair ? s->stride_w * channels : 0;
            for (int32_t c = 0; c < channels;) {
                const int trained = c < trained_c;
                const int32_t part_c = trained ? trained_c : channels - trained_c;
                const int32_t first = trained ? c : c - trained_c;
                const int32_t count = part_c - first < BLOCK ? part_c - first : BLOCK;
                add_channels(&v, c, (trained ? weights->trained : weights->frozen) + first, part_c, count, bias + c, sums);
                eft_requantize_pixels(sums, pair ? 2 : 1, count, out, c, y + c, channels, mask, index + c);
                c += count;
            }
            y += pair ? 2 * channels : channels;
            index += pair ? 2 * channels : channels;
            ox += pair ? 2 : 1;
        }
    }
}

#include "eft_dsp.h"
#include "eft_gradient.h"

/** The places of the output that see one place of the input, and where in the kernel the first of them does. */
typedef struct {
    const int16_t *g;      /**< The first, channel 0 */
    int32_t rows, columns;
    int32_t first_tap;
    int32_t row_step;      /**< From a row of g to the next, in elements */
    int32_t row_taps, column_taps; /**< By how many places of the kernel a row and a column more go back */
    int32_t channels;
} view;

#if EFT_DSP

/** Sums of four channels. */
static inline void sum_four(const view *v, const int16_t *g, const int8_t *w, int32_t w_step, const int16_t *scale,
                            int32_t shift, int32_t *sums)
{
    const uint32_t scale_a = eft_load2(scale);
    const uint32_t scale_b = eft_load2(scale + 2);
    const int32_t half = shift > 0 ? 1 << (shift - 1) : 0;
    int32_t s0 = 0, s1 = 0, s2 = 0, s3 = 0;
    for (int32_t y = v->rows; y > 0; y--) {
        const int16_t *at = g;
        const int8_t *weight = w;
        for (int32_t column = v->columns; column > 0; column--) {
            const uint32_t a = eft_load2(at);
            const uint32_t b = eft_load2(at + 2);
            const uint32_t four = eft_load4(weight);
            const uint32_t even = eft_even0(four);
            const uint32_t odd = eft_odd0(four);
            /* The operands fit 16 bits. */
            s0 = eft_smlabb((uint32_t)(eft_smlabb(a, scale_a, half) >> shift), even, s0);
            s1 = eft_smlabb((uint32_t)(eft_smlatt(a, scale_a, half) >> shift), odd, s1);
            s2 = eft_smlabt((uint32_t)(eft_smlabb(b, scale_b, half) >> shift), even, s2);
            s3 = eft_smlabt((uint32_t)(eft_smlatt(b, scale_b, half) >> shift), odd, s3);
            at += v->channels;
            weight -= v->column_taps * w_step;
        }
        g += v->row_step;
        w -= v->row_taps * w_step;
    }
    sums[0] = s0;
    sums[1] = s1;
    sums[2] = s2;
    sums[3] = s3;
}

#endif

/** Sums of channels [c, c + count), whose weights of one place of the kernel lie at w. */
static EFT_OUT_OF_LINE void sum_channels(const view *v, int32_t c, const int8_t *w, int32_t w_step, int32_t count,
                                         const int16_t *scale, int32_t shift, int32_t *sums)
{
    int32_t done = 0;
#if EFT_DSP
    for (; done + 4 <= count; done += 4) {
        sum_four(v, v->g + c + done, w + v->first_tap * w_step + done, w_step, scale + done, shift, sums + done);
    }
    if (done == count) {
        return;
    }
#endif
    for (int32_t j = done; j < count; j++) {
        sums[j] = 0;
    }
    for (int32_t y = 0; y < v->rows; y++) {
        for (int32_t column = 0; column < v->columns; column++) {
            const int16_t *const at = v->g + y * v->row_step + column * v->channels + c;
            const int8_t *const weight = w + (v->first_tap - y * v->row_taps - column * v->column_taps) * w_step;
            for (int32_t j = done; j < count; j++) {
                sums[j] += eft_rsh32((int32_t)at[j] * scale[j], shift) * weight[j];
            }
        }
    }
}

int32_t eft_depthwise_input_grad_s16(const int16_t *g, int32_t g_bits, const eft_conv_shape *shape, const eft_weights *weights,
                                     const eft_input_grad *constants, const uint8_t *x_mask, int16_t *gx, int32_t *scratch)
{
    const eft_conv_shape *s = shape;
    const int32_t shift = 15 - (constants->operand_bits - g_bits);
    const int32_t trained_c = weights->trained_c;
    const int32_t frozen_c = s->in_c - trained_c;
    uint32_t seen = 0;
    int32_t index = 0;
    view v;
    v.row_step = s->out_w * s->in_c;
    v.row_taps = s->stride_h * s->kernel_w;
    v.column_taps = s->stride_w;
    v.channels = s->in_c;
    for (int32_t iy = 0; iy < s->in_h; iy++) {
        const int32_t first_y = eft_first_output(iy + s->pad_h, s->kernel_h, s->stride_h);
        v.rows = eft_end_output(iy + s->pad_h, s->stride_h, s->out_h) - first_y;
        for (int32_t ix = 0; ix < s->in_w; ix++) {
            const int32_t first_x = eft_first_output(ix + s->pad_w, s->kernel_w, s->stride_w);
            v.columns = eft_end_output(ix + s->pad_w, s->stride_w, s->out_w) - first_x;
            v.g = g + first_y * v.row_step + first_x * s->in_c;
            v.first_tap = (iy + s->pad_h - first_y * s->stride_h) * s->kernel_w + ix + s->pad_w - first_x * s->stride_w;
            if (trained_c > 0) {
                sum_channels(&v, 0, weights->trained, trained_c, trained_c, constants->channel_scale, shift, scratch);
            }
            if (frozen_c > 0) {
                sum_channels(&v, trained_c, weights->frozen, frozen_c, frozen_c, constants->channel_scale + trained_c, shift,
                             scratch + trained_c);
            }
            seen |= eft_store_gradient(scratch, s->in_c, constants->shift, x_mask, index, gx);
            index += s->in_c;
        }
    }
    return eft_bit_length(seen);
}

/** Gradients of a depthwise convolution with respect to its input. Not part of the contract. */
#ifndef EFT_DEPTHWISE_INPUT_GRAD_H
#define EFT_DEPTHWISE_INPUT_GRAD_H

#include "eft_dsp.h"
#include "eft_gradient.h"

/** Places at a time. */
#define EFT_TAP_LIST 49

/** A place of the output that sees the place of the input at hand: distances of channel 0 of its gradient and of its weights. */
typedef struct {
    int32_t g, w;
} eft_tap;

/** The places of the output that see one place of the input, and through which place of the kernel the first of them does. */
typedef struct {
    int32_t first_row, rows, first_column, columns;
    int32_t ky, kx;
} eft_view;

/** Taps [first, first + count) of those in view; g_step and w_step are the channels of a place. */
static EFT_OUT_OF_LINE void eft_list_taps(eft_tap *taps, const eft_view *in, int32_t first, int32_t count,
                                          const eft_conv_shape *s, int32_t g_step, int32_t w_step)
{
    for (int32_t t = first; t < first + count; t++) {
        const int32_t row = t / in->columns;
        const int32_t column = t - row * in->columns;
        taps->g = ((in->first_row + row) * s->out_w + in->first_column + column) * g_step;
        taps->w = ((in->ky - row * s->stride_h) * s->kernel_w + in->kx - column * s->stride_w) * w_step;
        taps++;
    }
}

#if EFT_DSP

/** Sums of four channels. */
static inline void eft_add_four(const eft_tap *taps, int32_t count, const int16_t *g, const int8_t *w, const int16_t *scale,
                                int32_t shift, int32_t *sums)
{
    const uint32_t scale_a = eft_load2(scale);
    const uint32_t scale_b = eft_load2(scale + 2);
    const int32_t half = shift > 0 ? 1 << (shift - 1) : 0;
    const eft_tap *const end = taps + count;
    int32_t s0 = sums[0], s1 = sums[1], s2 = sums[2], s3 = sums[3];
    while (taps != end) {
        const int16_t *const at = g + taps->g;
        const uint32_t four = eft_load4(w + taps->w);
        const uint32_t a = eft_load2(at);
        const uint32_t even = eft_even0(four);
        const uint32_t odd = eft_odd0(four);
        /* The operands fit 16 bits. */
        s0 = eft_smlabb((uint32_t)(eft_smlabb(a, scale_a, half) >> shift), even, s0);
        s1 = eft_smlabb((uint32_t)(eft_smlatt(a, scale_a, half) >> shift), odd, s1);
        const uint32_t b = eft_load2(at + 2);
        s2 = eft_smlabt((uint32_t)(eft_smlabb(b, scale_b, half) >> shift), even, s2);
        s3 = eft_smlabt((uint32_t)(eft_smlatt(b, scale_b, half) >> shift), odd, s3);
        taps++;
    }
    sums[0] = s0;
    sums[1] = s1;
    sums[2] = s2;
    sums[3] = s3;
}

#endif

/** Add what some taps give to count channels, the first of which is at g and w. */
static EFT_OUT_OF_LINE void eft_add_taps(const eft_tap *taps, int32_t num_taps, const int16_t *g, const int8_t *w,
                                         const int16_t *scale, int32_t shift, int32_t count, int32_t *sums)
{
    int32_t done = 0;
#if EFT_DSP
    for (; done + 4 <= count; done += 4) {
        eft_add_four(taps, num_taps, g + done, w + done, scale + done, shift, sums + done);
    }
    if (done == count) {
        return;
    }
#endif
    for (int32_t t = 0; t < num_taps; t++) {
        const int16_t *const at = g + taps[t].g;
        const int8_t *const weight = w + taps[t].w;
        for (int32_t j = done; j < count; j++) {
            sums[j] += eft_rsh32((int32_t)at[j] * scale[j], shift) * weight[j];
        }
    }
}

/**
 * Gradients of channels [first, first + count), of which alone gx is made: [in_h][in_w][count].
 *
 * @param[in] g       From channel first on
 * @param[in] g_step  Channels from one pixel of g to the next
 */
EFT_SHARED int32_t eft_depthwise_input_grad(const int16_t *g, int32_t g_step, int32_t shift, const eft_conv_shape *s,
                                            const eft_weights *weights, const eft_input_grad *constants, const uint8_t *x_mask,
                                            int32_t first, int32_t count, int16_t *gx, int32_t *scratch)
{
    const int32_t trained_c = weights->trained_c;
    const int32_t frozen_c = s->in_c - trained_c;
    const int32_t learning = eft_clamp(trained_c - first, 0, count);
    uint32_t seen = 0;
    int32_t index = first;
    eft_tap taps[EFT_TAP_LIST];
    eft_view in;
    for (int32_t iy = 0; iy < s->in_h; iy++) {
        const int32_t y = iy + s->pad_h;
        in.first_row = eft_first_output(y, s->kernel_h, s->stride_h);
        in.rows = eft_end_output(y, s->stride_h, s->out_h) - in.first_row;
        in.ky = y - in.first_row * s->stride_h;
        for (int32_t ix = 0; ix < s->in_w; ix++) {
            const int32_t x = ix + s->pad_w;
            in.first_column = eft_first_output(x, s->kernel_w, s->stride_w);
            in.columns = eft_end_output(x, s->stride_w, s->out_w) - in.first_column;
            in.kx = x - in.first_column * s->stride_w;
            const int32_t num_taps = in.rows > 0 && in.columns > 0 ? in.rows * in.columns : 0;
            for (int32_t c = 0; c < count; c++) {
                scratch[c] = 0;
            }
            for (int32_t part = 0; part < 2; part++) {
                /* Channels that learn, and the others. */
                const int32_t from = part == 0 ? 0 : learning;
                const int32_t part_c = part == 0 ? learning : count - learning;
                const int8_t *const w = part == 0 ? weights->trained : weights->frozen;
                const int32_t w_step = part == 0 ? trained_c : frozen_c;
                const int32_t w_first = part == 0 ? first : first + learning - trained_c;
                if (part_c == 0) {
                    continue;
                }
                for (int32_t done = 0; done < num_taps; done += EFT_TAP_LIST) {
                    const int32_t some = num_taps - done < EFT_TAP_LIST ? num_taps - done : EFT_TAP_LIST;
                    eft_list_taps(taps, &in, done, some, s, g_step, w_step);
                    eft_add_taps(taps, some, g + from, w + w_first, constants->channel_scale + first + from, shift, part_c,
                                 scratch + from);
                }
            }
            seen |= eft_store_gradient(scratch, count, constants->shift, x_mask, index, gx);
            gx += count;
            index += s->in_c;
        }
    }
    return eft_bit_length(seen);
}

#endif

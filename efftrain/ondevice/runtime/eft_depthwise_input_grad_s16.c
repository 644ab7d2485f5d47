#include "eft_avx2_depthwise_input_grad.h"
#include "eft_dsp.h"
#include "eft_gradient.h"

/** Places at a time. */
#define TAPS 49

/** A place of the output that sees the place of the input at hand: distances of channel 0 of its gradient and of its weights. */
typedef struct {
    int32_t g, w;
} tap;

/** The places of the output that see one place of the input, and through which place of the kernel the first of them does. */
typedef struct {
    int32_t first_row, rows, first_column, columns;
    int32_t ky, kx;
} view;

/** Taps [first, first + count) of those in view. */
static EFT_OUT_OF_LINE void list_taps(tap *taps, const view *in, int32_t first, int32_t count, const eft_conv_shape *s,
                                      int32_t w_step)
{
    for (int32_t t = first; t < first + count; t++) {
        const int32_t row = t / in->columns;
        const int32_t column = t - row * in->columns;
        taps->g = ((in->first_row + row) * s->out_w + in->first_column + column) * s->in_c;
        taps->w = ((in->ky - row * s->stride_h) * s->kernel_w + in->kx - column * s->stride_w) * w_step;
        taps++;
    }
}

#if EFT_DSP

/** Sums of four channels. */
static inline void add_four(const tap *taps, int32_t count, const int16_t *g, const int8_t *w, const int16_t *scale,
                            int32_t shift, int32_t *sums)
{
    const uint32_t scale_a = eft_load2(scale);
    const uint32_t scale_b = eft_load2(scale + 2);
    const int32_t half = shift > 0 ? 1 << (shift - 1) : 0;
    const tap *const end = taps + count;
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
static EFT_OUT_OF_LINE void add_taps(const tap *taps, int32_t num_taps, const int16_t *g, const int8_t *w, const int16_t *scale,
                                     int32_t shift, int32_t count, int32_t *sums)
{
    int32_t done = 0;
#if EFT_DSP
    for (; done + 4 <= count; done += 4) {
        add_four(taps, num_taps, g + done, w + done, scale + done, shift, sums + done);
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

int32_t eft_depthwise_input_grad_s16(const int16_t *g, int32_t g_bits, const eft_conv_shape *shape, const eft_weights *weights,
                                     const eft_input_grad *constants, const uint8_t *x_mask, int16_t *gx, int32_t *scratch)
{
#if EFT_AVX2
    const int32_t bits = eft_depthwise_input_grad_avx2(g, g_bits, shape, weights, constants, x_mask, gx);
    if (bits >= 0) {
        return bits;
    }
#endif
    const eft_conv_shape *s = shape;
    const int32_t shift = 15 - (constants->operand_bits - g_bits);
    const int32_t trained_c = weights->trained_c;
    const int32_t frozen_c = s->in_c - trained_c;
    uint32_t seen = 0;
    int32_t index = 0;
    tap taps[TAPS];
    view in;
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
            for (int32_t c = 0; c < s->in_c; c++) {
                scratch[c] = 0;
            }
            for (int32_t part = 0; part < 2; part++) {
                const int32_t first_c = part == 0 ? 0 : trained_c;
                const int32_t part_c = part == 0 ? trained_c : frozen_c;
                if (part_c == 0) {
                    continue;
                }
                for (int32_t first = 0; first < num_taps; first += TAPS) {
                    const int32_t some = num_taps - first < TAPS ? num_taps - first : TAPS;
                    list_taps(taps, &in, first, some, s, part_c);
                    add_taps(taps, some, g + first_c, part == 0 ? weights->trained : weights->frozen,
                             constants->channel_scale + first_c, shift, part_c, scratch + first_c);
                }
            }
            seen |= eft_store_gradient(scratch, s->in_c, constants->shift, x_mask, index, gx);
            index += s->in_c;
        }
    }
    return eft_bit_length(seen);
}

/** Gradients of a dense convolution with respect to its input. Not part of the contract. */
#ifndef EFT_CONV_INPUT_GRAD_H
#define EFT_CONV_INPUT_GRAD_H

#include "eft_dsp.h"
#include "eft_gradient.h"

/** Output channels at a time. */
#define EFT_BLOCK 128

/**
 * Scaled gradients of two neighboring places, as they are multiplied with the same weights; 0 where there is no place. Two output
 * channels each, the second 0 if their number is odd.
 */
typedef union {
    uint32_t word[2];
    int16_t half[4]; /**< Two of the first place, two of the second */
} eft_operands;

static EFT_OUT_OF_LINE void eft_fill_operands(eft_operands *h, const int16_t *x, const int16_t *z, const int16_t *scale,
                                              int32_t shift, int32_t count)
{
    const int32_t half = shift > 0 ? 1 << (shift - 1) : 0;
    for (int32_t o = 0; o < count; o++) {
        h[o >> 1].half[o & 1] = (int16_t)(x != NULL ? (x[o] * scale[o] + half) >> shift : 0);
        h[o >> 1].half[2 + (o & 1)] = (int16_t)(z != NULL ? (z[o] * scale[o] + half) >> shift : 0);
    }
    if ((count & 1) != 0) {
        h[count >> 1].half[1] = 0;
        h[count >> 1].half[3] = 0;
    }
}

#if EFT_DSP

/* Two pairs of output channels: 16 products in 27 instructions. */
#define EFT_TWO_PAIRS(ROTATE)                                                                                                      \
    __asm volatile("1:\n\t"                                                                                                        \
                   "ldr %[a], [%[w]]\n\t"                                                                                          \
                   "ldr %[b], [%[w], %[step]]\n\t"                                                                                 \
                   "ldrd %[hx], %[hz], [%[h]], #8\n\t"                                                                             \
                   "add %[w], %[w], %[step], lsl #1\n\t"                                                                           \
                   "sxtb16 %[a], %[a]" ROTATE "\n\t"                                                                               \
                   "sxtb16 %[b], %[b]" ROTATE "\n\t"                                                                               \
                   "pkhbt %[c], %[a], %[b], lsl #16\n\t"                                                                           \
                   "pkhtb %[b], %[b], %[a], asr #16\n\t"                                                                           \
                   "smlad %[x0], %[c], %[hx], %[x0]\n\t"                                                                           \
                   "smlad %[z0], %[c], %[hz], %[z0]\n\t"                                                                           \
                   "smlad %[x2], %[b], %[hx], %[x2]\n\t"                                                                           \
                   "smlad %[z2], %[b], %[hz], %[z2]\n\t"                                                                           \
                   "ldr %[a], [%[w]]\n\t"                                                                                          \
                   "ldr %[b], [%[w], %[step]]\n\t"                                                                                 \
                   "ldrd %[hx], %[hz], [%[h]], #8\n\t"                                                                             \
                   "add %[w], %[w], %[step], lsl #1\n\t"                                                                           \
                   "sxtb16 %[a], %[a]" ROTATE "\n\t"                                                                               \
                   "sxtb16 %[b], %[b]" ROTATE "\n\t"                                                                               \
                   "pkhbt %[c], %[a], %[b], lsl #16\n\t"                                                                           \
                   "pkhtb %[b], %[b], %[a], asr #16\n\t"                                                                           \
                   "smlad %[x0], %[c], %[hx], %[x0]\n\t"                                                                           \
                   "smlad %[z0], %[c], %[hz], %[z0]\n\t"                                                                           \
                   "smlad %[x2], %[b], %[hx], %[x2]\n\t"                                                                           \
                   "smlad %[z2], %[b], %[hz], %[z2]\n\t"                                                                           \
                   "ldr %[a], %[end]\n\t"                                                                                          \
                   "cmp %[a], %[h]\n\t"                                                                                            \
                   "bne 1b"                                                                                                        \
                   : [x0] "+r"(x0), [x2] "+r"(x2), [z0] "+r"(z0), [z2] "+r"(z2), [h] "+r"(h), [w] "+r"(w), [a] "=&r"(a),           \
                     [b] "=&r"(b), [c] "=&r"(c), [hx] "=&r"(hx), [hz] "=&r"(hz)                                                    \
                   : [step] "r"(step), [end] "m"(end)                                                                              \
                   : "cc", "memory")

/** Input channels 0 and 2, or 1 and 3, of four: the loop runs over pairs of output channels, and the sums stay in registers. */
static inline void eft_add_lanes(const eft_operands *h, int32_t pairs, const int8_t *w, int32_t step, int odd, int32_t *x, int32_t *z)
{
    int32_t x0 = x[0], x2 = x[2], z0 = z[0], z2 = z[2];
    const eft_operands *const end = h + pairs;
    uint32_t a, b, c, hx, hz;
    if ((pairs & 1) != 0) {
        const uint32_t first = eft_load4(w);
        const uint32_t second = eft_load4(w + step);
        a = odd ? eft_odd0(first) : eft_even0(first);
        b = odd ? eft_odd0(second) : eft_even0(second);
        hx = h->word[0];
        hz = h->word[1];
        x0 = eft_smlad(eft_lower(a, b), hx, x0);
        z0 = eft_smlad(eft_lower(a, b), hz, z0);
        x2 = eft_smlad(eft_upper(a, b), hx, x2);
        z2 = eft_smlad(eft_upper(a, b), hz, z2);
        w += 2 * step;
        h++;
    }
    if (h != end && odd) {
        EFT_TWO_PAIRS(", ror #8");
    } else if (h != end) {
        EFT_TWO_PAIRS("");
    }
    /* Without a second place z is x, and its sums have nothing added. */
    z[0] = z0;
    z[2] = z2;
    x[0] = x0;
    x[2] = x2;
}

#endif

/** Add what some output channels send back to input channels [0, inputs) of one place, whose operands begin at h. */
static void eft_add_rows(const eft_operands *h, int32_t place, int32_t count, const int8_t *w, int32_t step, int32_t inputs,
                         int32_t *restrict sums)
{
    int32_t o = 0;
    for (; o + 4 <= count; o += 4) {
        const int16_t *const a = h[o >> 1].half + place;
        const int16_t *const b = h[(o >> 1) + 1].half + place;
        const int16_t h0 = a[0], h1 = a[1], h2 = b[0], h3 = b[1];
        const int8_t *const second = w + step;
        const int8_t *const third = second + step;
        const int8_t *const fourth = third + step;
        for (int32_t i = 0; i < inputs; i++) {
            sums[i] += h0 * (int16_t)w[i] + h1 * (int16_t)second[i] + h2 * (int16_t)third[i] + h3 * (int16_t)fourth[i];
        }
        w += 4 * step;
    }
    for (; o < count; o++) {
        const int16_t value = h[o >> 1].half[place + (o & 1)];
        for (int32_t i = 0; i < inputs; i++) {
            sums[i] += value * (int16_t)w[i];
        }
        w += step;
    }
}

/** The same for both places, whose sums are x and z; z is x if there is no second place. */
static EFT_OUT_OF_LINE void eft_add_products(const eft_operands *h, int32_t count, const int8_t *w, int32_t step,
                                             int32_t inputs, int32_t *x, int32_t *z)
{
    int32_t i = 0;
#if EFT_DSP
    for (; i + 4 <= inputs; i += 4) {
        const int8_t *const last = w + i + (count - 1) * step;
        eft_add_lanes(h, count >> 1, w + i, step, 0, x + i, z + i);
        eft_add_lanes(h, count >> 1, w + i, step, 1, x + i + 1, z + i + 1);
        if ((count & 1) != 0) {
            /* The last output channel, paired with itself: the operands of its double are 0. */
            eft_add_lanes(h + (count >> 1), 1, last, 0, 0, x + i, z + i);
            eft_add_lanes(h + (count >> 1), 1, last, 0, 1, x + i + 1, z + i + 1);
        }
    }
#endif
    if (i < inputs) {
        eft_add_rows(h, 0, count, w + i, step, inputs - i, x + i);
        if (z != x) {
            eft_add_rows(h, 2, count, w + i, step, inputs - i, z + i);
        }
    }
}

/** The output column that sees column ix through place kx of the kernel, or -1. */
static int32_t eft_seen_by(int32_t ix, int32_t kx, int32_t pad, int32_t stride, int32_t outputs)
{
    const int32_t at = ix + pad - kx;
    return at >= 0 && at % stride == 0 && at / stride < outputs ? at / stride : -1;
}

/** Sums of input channels [first, first + inputs) of columns ix and, if pixels is 2, ix + 1. */
static EFT_OUT_OF_LINE void eft_add_window(const int16_t *g, int32_t shift, const eft_conv_shape *s, const eft_weights *weights,
                                           const int16_t *scale, int32_t iy, int32_t ix, int32_t pixels, int32_t first,
                                           int32_t inputs, int32_t *sums)
{
    const int32_t taps = s->kernel_h * s->kernel_w;
    const int32_t trained_c = weights->trained_c;
    const int32_t frozen_c = s->in_c - trained_c;
    const int32_t in_trained = first >= trained_c ? 0 : (first + inputs <= trained_c ? inputs : trained_c - first);
    int32_t *const second = sums + (pixels == 2 ? inputs : 0);
    eft_operands h[EFT_BLOCK / 2];
    for (int32_t tap = 0; tap < taps; tap++) {
        const int32_t ky = tap / s->kernel_w;
        const int32_t oy = eft_seen_by(iy, ky, s->pad_h, s->stride_h, s->out_h);
        const int32_t ox = eft_seen_by(ix, tap - ky * s->kernel_w, s->pad_w, s->stride_w, s->out_w);
        const int32_t oz = pixels == 2 ? eft_seen_by(ix + 1, tap - ky * s->kernel_w, s->pad_w, s->stride_w, s->out_w) : -1;
        if (oy < 0 || (ox < 0 && oz < 0)) {
            continue;
        }
        for (int32_t o = 0; o < s->out_c; o += EFT_BLOCK) {
            const int32_t count = s->out_c - o < EFT_BLOCK ? s->out_c - o : EFT_BLOCK;
            const int16_t *const x = ox < 0 ? NULL : g + (oy * s->out_w + ox) * s->out_c + o;
            const int16_t *const z = oz < 0 ? NULL : g + (oy * s->out_w + oz) * s->out_c + o;
            eft_fill_operands(h, x, z, scale + o, shift, count);
            if (in_trained > 0) {
                const int8_t *const w = weights->trained + (o * taps + tap) * trained_c + first;
                eft_add_products(h, count, w, taps * trained_c, in_trained, sums, second);
            }
            if (in_trained < inputs) {
                const int8_t *const w = weights->frozen + (o * taps + tap) * frozen_c + first + in_trained - trained_c;
                eft_add_products(h, count, w, taps * frozen_c, inputs - in_trained, sums + in_trained, second + in_trained);
            }
        }
    }
}

/**
 * Gradients of input channels [first, end), of which alone gx is made: [in_h][in_w][end - first].
 *
 * @param[in] part  Channels that two columns have at a time, in a scratch of 2 * part; one column has all. 0: never two columns
 */
EFT_SHARED int32_t eft_conv_input_grad(const int16_t *g, int32_t shift, const eft_conv_shape *s, const eft_weights *weights,
                                       const eft_input_grad *constants, const uint8_t *x_mask, int32_t first, int32_t end,
                                       int32_t part, int16_t *gx, int32_t *scratch)
{
    uint32_t seen = 0;
    int32_t index = 0;
    for (int32_t iy = 0; iy < s->in_h; iy++) {
        for (int32_t ix = 0; ix < s->in_w;) {
            const int32_t pixels = s->stride_w == 1 && ix + 1 < s->in_w && part > 0 ? 2 : 1;
            const int32_t step = pixels == 2 ? part : end - first;
            for (int32_t channel = first; channel < end; channel += step) {
                const int32_t inputs = end - channel < step ? end - channel : step;
                for (int32_t i = 0; i < pixels * inputs; i++) {
                    scratch[i] = 0;
                }
                eft_add_window(g, shift, s, weights, constants->channel_scale, iy, ix, pixels, channel, inputs, scratch);
                for (int32_t pixel = 0; pixel < pixels; pixel++) {
                    const int32_t at = index + pixel * s->in_c + channel;
                    int16_t *const to = gx + pixel * (end - first) + channel - first;
                    seen |= eft_store_gradient(scratch + pixel * inputs, inputs, constants->shift, x_mask, at, to);
                }
            }
            gx += pixels * (end - first);
            index += pixels * s->in_c;
            ix += pixels;
        }
    }
    return eft_bit_length(seen);
}

#endif

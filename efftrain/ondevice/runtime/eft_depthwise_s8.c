#include "eft_avx2_depthwise.h"
#include "eft_dsp.h"
#include "eft_requantize.h"

/** Channels at a time. */
#define BLOCK 16

/** Places of the kernel at a time. */
#define TAPS 49

/** A place of the kernel that lies on the input: its distance from the first column of the window in row 0, and of its weights. */
typedef struct {
    int32_t x, w;
} tap;

/** The part of a kernel that lies on the input. */
typedef struct {
    int32_t first_row, rows, first_column, columns;
} window;

static inline window window_at(const eft_conv_shape *s, int32_t oy, int32_t ox)
{
    const int32_t top = oy * s->stride_h - s->pad_h;
    const int32_t left = ox * s->stride_w - s->pad_w;
    const int32_t end_row = top + s->kernel_h > s->in_h ? s->in_h - top : s->kernel_h;
    const int32_t end_column = left + s->kernel_w > s->in_w ? s->in_w - left : s->kernel_w;
    window found;
    found.first_row = top < 0 ? -top : 0;
    found.first_column = left < 0 ? -left : 0;
    found.columns = end_column > found.first_column ? end_column - found.first_column : 0;
    found.rows = end_row > found.first_row && found.columns > 0 ? end_row - found.first_row : 0;
    return found;
}

/** Taps [first, first + count) of those in the window. */
static EFT_OUT_OF_LINE void list_taps(tap *taps, const window *in, int32_t first, int32_t count, const eft_conv_shape *s,
                                      int32_t ring, int32_t oy, int32_t w_step)
{
    int32_t row = in->columns > 0 ? first / in->columns : 0;
    int32_t column = first - row * in->columns;
    for (const tap *const end = taps + count; taps != end;) {
        const int32_t ky = in->first_row + row;
        const int32_t iy = oy * s->stride_h - s->pad_h + ky;
        int32_t x = ((iy % ring) * s->in_w + column) * s->in_c;
        int32_t w = (ky * s->kernel_w + in->first_column + column) * w_step;
        for (; column < in->columns && taps != end; column++) {
            taps->x = x;
            taps->w = w;
            taps++;
            x += s->in_c;
            w += w_step;
        }
        column = 0;
        row++;
    }
}

#if EFT_DSP

/** Four channels, whose sums lie at every other place. */
static inline void add_four(const tap *taps, int32_t count, const int8_t *x, const int8_t *w, uint32_t plus,
                            const int32_t *bias, int32_t *sums)
{
    int32_t s0 = bias != NULL ? bias[0] : sums[0];
    int32_t s1 = bias != NULL ? bias[1] : sums[2];
    int32_t s2 = bias != NULL ? bias[2] : sums[4];
    int32_t s3 = bias != NULL ? bias[3] : sums[6];
    const tap *const end = taps + count;
    if ((count & 1) != 0) {
        const uint32_t x4 = eft_load4(x + taps->x);
        const uint32_t w4 = eft_load4(w + taps->w);
        s0 = eft_smlabb(eft_even(x4, plus), eft_even0(w4), s0);
        s2 = eft_smlatt(eft_even(x4, plus), eft_even0(w4), s2);
        s1 = eft_smlabb(eft_odd(x4, plus), eft_odd0(w4), s1);
        s3 = eft_smlatt(eft_odd(x4, plus), eft_odd0(w4), s3);
        taps++;
    }
    if (taps != end) {
        uint32_t a, b, c, d;
        /* Two taps: 8 products in 26 instructions. */
        __asm volatile("1:\n\t"
                       "ldrd %[a], %[b], [%[taps], #0]\n\t"
                       "ldr %[a], [%[x], %[a]]\n\t"
                       "ldr %[b], [%[w], %[b]]\n\t"
                       "sxtab16 %[c], %[plus], %[a]\n\t"
                       "sxtb16 %[d], %[b]\n\t"
                       "smlabb %[s0], %[c], %[d], %[s0]\n\t"
                       "smlatt %[s2], %[c], %[d], %[s2]\n\t"
                       "sxtab16 %[c], %[plus], %[a], ror #8\n\t"
                       "sxtb16 %[d], %[b], ror #8\n\t"
                       "smlabb %[s1], %[c], %[d], %[s1]\n\t"
                       "smlatt %[s3], %[c], %[d], %[s3]\n\t"
                       "ldrd %[a], %[b], [%[taps], #8]\n\t"
                       "ldr %[a], [%[x], %[a]]\n\t"
                       "ldr %[b], [%[w], %[b]]\n\t"
                       "sxtab16 %[c], %[plus], %[a]\n\t"
                       "sxtb16 %[d], %[b]\n\t"
                       "smlabb %[s0], %[c], %[d], %[s0]\n\t"
                       "smlatt %[s2], %[c], %[d], %[s2]\n\t"
                       "sxtab16 %[c], %[plus], %[a], ror #8\n\t"
                       "sxtb16 %[d], %[b], ror #8\n\t"
                       "ldr %[a], %[end]\n\t"
                       "adds %[taps], #16\n\t"
                       "smlabb %[s1], %[c], %[d], %[s1]\n\t"
                       "smlatt %[s3], %[c], %[d], %[s3]\n\t"
                       "cmp %[a], %[taps]\n\t"
                       "bne 1b"
                       : [s0] "+r"(s0), [s1] "+r"(s1), [s2] "+r"(s2), [s3] "+r"(s3), [taps] "+r"(taps), [a] "=&r"(a),
                         [b] "=&r"(b), [c] "=&r"(c), [d] "=&r"(d)
                       : [x] "r"(x), [w] "r"(w), [plus] "r"(plus), [end] "m"(end)
                       : "cc", "memory");
    }
    sums[0] = s0;
    sums[2] = s1;
    sums[4] = s2;
    sums[6] = s3;
}

#endif

/** What some taps give to count channels, the first of which is at x and w; sums lie at every other place. */
static EFT_OUT_OF_LINE void add_taps(const tap *taps, int32_t num_taps, const int8_t *x, const int8_t *w, int32_t zero_point,
                                     int32_t count, const int32_t *bias, int32_t *sums)
{
#if EFT_DSP
    const uint32_t plus = eft_minus(zero_point);
    for (; count >= 4; count -= 4) {
        add_four(taps, num_taps, x, w, plus, bias, sums);
        x += 4;
        w += 4;
        bias = bias != NULL ? bias + 4 : NULL;
        sums += 8;
    }
    if (count == 0) {
        return;
    }
#endif
    int32_t totals[BLOCK];
    for (int32_t j = 0; j < count; j++) {
        totals[j] = bias != NULL ? bias[j] : sums[2 * j];
    }
    for (int32_t t = 0; t < num_taps; t++) {
        const int8_t *const inputs = x + taps[t].x;
        const int8_t *const weights = w + taps[t].w;
        for (int32_t j = 0; j < count; j++) {
            totals[j] += ((int32_t)inputs[j] - zero_point) * weights[j];
        }
    }
    for (int32_t j = 0; j < count; j++) {
        sums[2 * j] = totals[j];
    }
}

void eft_depthwise_s8(const int8_t *x, const eft_conv_shape *shape, int32_t x_zero_point, const eft_weights *weights,
                      const int32_t *bias, const eft_requantize *out, const eft_rows *rows, int8_t *y, uint8_t *mask)
{
#if EFT_AVX2
    if (eft_depthwise_avx2(x, shape, x_zero_point, weights, bias, out, rows, y, mask)) {
        return;
    }
#endif
    const int32_t channels = shape->in_c;
    const int32_t trained_c = weights->trained_c;
    int32_t index = rows->first * shape->out_w * channels;
    int32_t sums[2 * BLOCK];
    tap taps[TAPS];
    for (int32_t oy = rows->first; oy < rows->first + rows->count; oy++) {
        window listed = {0, 0, 0, 0};
        int32_t listed_first = -1; /* First tap of the list, -1 if there is none */
        int32_t listed_c = 0;
        for (int32_t ox = 0; ox < shape->out_w;) {
            const window in = window_at(shape, oy, ox);
            const window second = window_at(shape, oy, ox + 1);
            const int32_t num_taps = in.rows * in.columns;
            /* Two pixels that see as much, at once. */
            const int pair = ox + 1 < shape->out_w && in.first_column == second.first_column && in.columns == second.columns;
            const int32_t left = ox * shape->stride_w - shape->pad_w + in.first_column;
            const int8_t *const inputs = x + left * channels;
            if (in.first_column != listed.first_column || in.columns != listed.columns) {
                listed = in;
                listed_first = -1;
            }
            for (int32_t c = 0; c < channels;) {
                const int trained = c < trained_c;
                const int32_t part_c = trained ? trained_c : channels - trained_c;
                const int32_t part = trained ? c : c - trained_c;
                const int32_t count = part_c - part < BLOCK ? part_c - part : BLOCK;
                const int8_t *const w = (trained ? weights->trained : weights->frozen) + part;
                const int32_t *begin = bias + c;
                int32_t first = 0;
                do {
                    const int32_t some = num_taps - first < TAPS ? num_taps - first : TAPS;
                    if (listed_first != first || listed_c != part_c) {
                        list_taps(taps, &in, first, some, shape, rows->ring, oy, part_c);
                        listed_first = first;
                        listed_c = part_c;
                    }
                    add_taps(taps, some, inputs + c, w, x_zero_point, count, begin, sums);
                    if (pair) {
                        add_taps(taps, some, inputs + shape->stride_w * channels + c, w, x_zero_point, count, begin, sums + 1);
                    }
                    begin = NULL;
                    first += TAPS;
                } while (first < num_taps);
                eft_requantize_pixels(sums, pair ? 2 : 1, count, out, c, y + c, channels, mask, index + c);
                c += count;
            }
            y += pair ? 2 * channels : channels;
            index += pair ? 2 * channels : channels;
            ox += pair ? 2 : 1;
        }
    }
}

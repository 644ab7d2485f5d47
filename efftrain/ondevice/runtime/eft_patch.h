/**
 * What a kernel sees of its input at two neighboring places of the output, as int16 with the zero point taken away and 0 beyond the
 * input. The sums of many output channels are taken from one patch, so that inputs are prepared once. Not part of the contract.
 */
#ifndef EFT_PATCH_H
#define EFT_PATCH_H

#include "eft_dsp.h"
#include "eft_internal.h"

/**
 * Inputs of one pixel in a patch. More are taken in several. A multiple of 4; a patch is 4 times as many bytes of stack, of which a
 * system with a C library has plenty.
 */
#if __STDC_HOSTED__
#define EFT_PATCH 2048
#else
#define EFT_PATCH 112
#endif

typedef union {
    uint32_t aligned; /**< Not used; pairs of int16 are read as words */
    int16_t half[2 * EFT_PATCH];
} eft_patch;

/** A call of a convolution, as much as inputs and weights depend on. */
typedef struct {
    const int8_t *x; /**< From the first of the channels on that its outputs see */
    const eft_conv_shape *shape;
    const eft_weights *weights;
    int32_t ring, zero_point;
    int32_t channels;  /**< So many: in_c, or those of a group */
    int32_t pointwise; /**< Each output sees one pixel, which is there */
} eft_layer;

static inline eft_layer eft_layer_of(const int8_t *x, const eft_conv_shape *s, int32_t groups, const eft_weights *weights,
                                     int32_t ring, int32_t zero_point)
{
    const int inside = (s->out_h - 1) * s->stride_h < s->in_h && (s->out_w - 1) * s->stride_w < s->in_w;
    const int pointwise = s->kernel_h == 1 && s->kernel_w == 1 && s->pad_h == 0 && s->pad_w == 0 && inside;
    const eft_layer layer = {x, s, weights, ring, zero_point, s->in_c / groups, pointwise};
    return layer;
}

/** Input channels whose weights lie together: part 0 are those that learn, part 1 the others. */
static inline int32_t eft_part_channels(const eft_layer *layer, int32_t part)
{
    return part == 0 ? layer->weights->trained_c : layer->channels - layer->weights->trained_c;
}

/** Where input k of a pixel is: with DSP four inputs of both pixels are x0 x2 z0 z2 x1 x3 z1 z3, as sxtb16 takes weights apart. */
static inline int32_t eft_patch_index(int32_t pixel, int32_t k)
{
#if EFT_DSP
    return (k >> 2) * 8 + ((k & 1) << 2) + pixel * 2 + ((k & 2) >> 1);
#else
    return pixel * EFT_PATCH + k;
#endif
}

/** Inputs [0, count) of one pixel. What is left of the last four lies behind them, aligned to its end, with zeros before it. */
static inline void eft_patch_fill(eft_patch *patch, int32_t pixel, int32_t count, const int8_t *x, int32_t zero_point)
{
    int32_t k = 0;
#if EFT_DSP
    const uint32_t plus = eft_minus(zero_point);
    eft_pair *to = (eft_pair *)(void *)patch->half + pixel;
    const int8_t *const end = x + (count & ~3);
    while (x != end) {
        const uint32_t four = eft_load4(x);
        to[0] = eft_even(four, plus);
        to[2] = eft_odd(four, plus);
        to += 4;
        x += 4;
    }
    k = count & ~3;
    if (k != count) {
        to[0] = 0;
        to[2] = 0;
    }
    x -= k;
    for (; k < count; k++) {
        patch->half[eft_patch_index(pixel, (count & ~3) + 4 - count + k)] = (int16_t)(x[k] - zero_point);
    }
#else
    for (; k < count; k++) {
        patch->half[eft_patch_index(pixel, k)] = (int16_t)(x[k] - zero_point);
    }
#endif
}

/** Bytes from one place to another. */
static inline void eft_copy_run(int8_t *to, const int8_t *from, int32_t count)
{
#if EFT_DSP
    for (; count >= 4; count -= 4) {
        const uint32_t four = eft_load4(from);
        __builtin_memcpy(to, &four, 4);
        to += 4;
        from += 4;
    }
#endif
    for (; count > 0; count--) {
        *to++ = *from++;
    }
}

/**
 * Inputs [first, first + count) of a part of the channels that the window of output (oy, ox) sees, counted as their weights are:
 * places of the kernel, channels.
 */
static inline void eft_patch_gather(eft_patch *patch, int32_t pixel, const eft_layer *layer, int32_t part, int32_t oy, int32_t ox,
                                    int32_t first, int32_t count)
{
    const eft_conv_shape *s = layer->shape;
    const int32_t channels = eft_part_channels(layer, part);
    const int32_t in_c = s->in_c;
    const int32_t row_bytes = s->in_w * in_c;
    const int32_t top = oy * s->stride_h - s->pad_h;
    const int32_t left = (ox * s->stride_w - s->pad_w) * in_c + (part == 0 ? 0 : layer->weights->trained_c);
    if (layer->pointwise) {
        eft_patch_fill(patch, pixel, count, layer->x + (top % layer->ring) * row_bytes + left + first, layer->zero_point);
        return;
    }
    /* With all channels, a row of the kernel is one run of the input; otherwise each place is. */
    const int whole = channels == in_c;
    const int32_t per_row = whole ? 1 : s->kernel_w;
    const int32_t length = whole ? s->kernel_w * in_c : channels;
    int32_t run = first / length;
    int32_t skip = first - run * length;
    int32_t k = 0;
    int8_t inputs[EFT_PATCH];
    while (k < count) {
        const int32_t row = run / per_row;
        const int32_t iy = top + row;
        const int32_t n = length - skip < count - k ? length - skip : count - k;
        const int32_t start = left + (run - row * per_row) * in_c + skip;
        /* The part [before, end) of the n that lies on the input. */
        int32_t before = start < 0 ? (-start < n ? -start : n) : 0;
        int32_t end = start + n > row_bytes ? row_bytes - start : n;
        if (iy < 0 || iy >= s->in_h || end < before) {
            before = n;
            end = n;
        }
        for (int32_t i = 0; i < before; i++) {
            inputs[k + i] = (int8_t)layer->zero_point;
        }
        if (before < end) {
            eft_copy_run(inputs + k + before, layer->x + (iy % layer->ring) * row_bytes + start + before, end - before);
        }
        for (int32_t i = end; i < n; i++) {
            inputs[k + i] = (int8_t)layer->zero_point;
        }
        k += n;
        skip = 0;
        run++;
    }
    eft_patch_fill(patch, pixel, count, inputs, layer->zero_point);
}

/** Four weights of two channels, and the same four inputs of two pixels. */
#if EFT_DSP
#define EFT_QUAD(from, v, w)                                                                                                       \
    do {                                                                                                                           \
        const uint32_t v4 = eft_load4(v);                                                                                          \
        const uint32_t w4 = eft_load4(w);                                                                                          \
        const uint32_t v_even = eft_even0(v4), v_odd = eft_odd0(v4);                                                               \
        const uint32_t w_even = eft_even0(w4), w_odd = eft_odd0(w4);                                                               \
        xv = eft_smlad((from)[2], v_odd, eft_smlad((from)[0], v_even, xv));                                                        \
        zv = eft_smlad((from)[3], v_odd, eft_smlad((from)[1], v_even, zv));                                                        \
        xw = eft_smlad((from)[2], w_odd, eft_smlad((from)[0], w_even, xw));                                                        \
        zw = eft_smlad((from)[3], w_odd, eft_smlad((from)[1], w_even, zw));                                                        \
    } while (0)
#endif

/** Where the sums of one call of eft_patch_dot begin: with the biases, or with what the sums are. */
typedef struct {
    const int32_t *at;
    int32_t channel, pixel; /**< Distances from one to the next; 0 if both pixels begin with the same */
} eft_begin;

/**
 * Sums of both pixels with two output channels, of which v and w are the weights.
 *
 * @param[out] sums   Channel v with both pixels, then channel w
 */
static inline void eft_patch_dot(const eft_patch *patch, int32_t count, const int8_t *v, const int8_t *w, const int32_t *begin,
                                 int32_t channel, int32_t pixel, int32_t *sums)
{
    int32_t xv = begin[0];
    int32_t zv = begin[pixel];
    int32_t xw = begin[channel];
    int32_t zw = begin[channel + pixel];
#if EFT_DSP
    const eft_pair *from = (const eft_pair *)(const void *)patch->half;
    const eft_pair *const end = from + (count & ~7);
    if (from != end) {
        uint32_t x2, z2, v4, w4, two;
        /* Two quads: 32 products in 35 instructions, with all registers but two. */
        __asm volatile("1:\n\t"
                       "ldrd %[x2], %[z2], [%[from], #0]\n\t"
                       "ldr %[v4], [%[v]], #4\n\t"
                       "ldr %[w4], [%[w]], #4\n\t"
                       "sxtb16 %[two], %[v4]\n\t"
                       "smlad %[xv], %[x2], %[two], %[xv]\n\t"
                       "smlad %[zv], %[z2], %[two], %[zv]\n\t"
                       "sxtb16 %[two], %[w4]\n\t"
                       "smlad %[xw], %[x2], %[two], %[xw]\n\t"
                       "smlad %[zw], %[z2], %[two], %[zw]\n\t"
                       "ldrd %[x2], %[z2], [%[from], #8]\n\t"
                       "sxtb16 %[two], %[v4], ror #8\n\t"
                       "smlad %[xv], %[x2], %[two], %[xv]\n\t"
                       "smlad %[zv], %[z2], %[two], %[zv]\n\t"
                       "sxtb16 %[two], %[w4], ror #8\n\t"
                       "smlad %[xw], %[x2], %[two], %[xw]\n\t"
                       "smlad %[zw], %[z2], %[two], %[zw]\n\t"
                       "ldrd %[x2], %[z2], [%[from], #16]\n\t"
                       "ldr %[v4], [%[v]], #4\n\t"
                       "ldr %[w4], [%[w]], #4\n\t"
                       "sxtb16 %[two], %[v4]\n\t"
                       "smlad %[xv], %[x2], %[two], %[xv]\n\t"
                       "smlad %[zv], %[z2], %[two], %[zv]\n\t"
                       "sxtb16 %[two], %[w4]\n\t"
                       "smlad %[xw], %[x2], %[two], %[xw]\n\t"
                       "smlad %[zw], %[z2], %[two], %[zw]\n\t"
                       "ldrd %[x2], %[z2], [%[from], #24]\n\t"
                       "sxtb16 %[two], %[v4], ror #8\n\t"
                       "ldr %[v4], %[end]\n\t"
                       "smlad %[xv], %[x2], %[two], %[xv]\n\t"
                       "smlad %[zv], %[z2], %[two], %[zv]\n\t"
                       "sxtb16 %[two], %[w4], ror #8\n\t"
                       "adds %[from], #32\n\t"
                       "smlad %[xw], %[x2], %[two], %[xw]\n\t"
                       "smlad %[zw], %[z2], %[two], %[zw]\n\t"
                       "cmp %[v4], %[from]\n\t"
                       "bne 1b"
                       : [xv] "+r"(xv), [xw] "+r"(xw), [zv] "+r"(zv), [zw] "+r"(zw), [from] "+r"(from), [v] "+r"(v),
                         [w] "+r"(w), [x2] "=&r"(x2), [z2] "=&r"(z2), [v4] "=&r"(v4), [w4] "=&r"(w4), [two] "=&r"(two)
                       : [end] "m"(end)
                       : "cc", "memory");
    }
    if ((count & 7) != 0) {
        if ((count & 4) != 0) {
            EFT_QUAD(from, v, w);
            from += 4;
            v += 4;
            w += 4;
        }
        const int32_t rest = count & 3;
        if (rest != 0 && count > 4) {
            /* The last four weights, of which some have been: the patch has zeros for those. */
            EFT_QUAD(from, v + rest - 4, w + rest - 4);
        } else if (rest != 0) {
            for (int32_t i = 0; i < rest; i++) {
                const int32_t x = patch->half[eft_patch_index(0, count - rest + 4 - rest + i)];
                const int32_t z = patch->half[eft_patch_index(1, count - rest + 4 - rest + i)];
                xv += x * v[i];
                xw += x * w[i];
                zv += z * v[i];
                zw += z * w[i];
            }
        }
    }
#else
    for (int32_t i = 0; i < count; i++) {
        const int32_t x = patch->half[i];
        const int32_t z = patch->half[EFT_PATCH + i];
        xv += x * v[i];
        xw += x * w[i];
        zv += z * v[i];
        zw += z * w[i];
    }
#endif
    sums[0] = xv;
    sums[1] = zv;
    sums[2] = xw;
    sums[3] = zw;
}

#endif

/** Gradients with respect to the input of a convolution with AVX2. Not part of the contract. */
#ifndef EFT_AVX2_INPUT_GRAD_H
#define EFT_AVX2_INPUT_GRAD_H

#include "eft_avx2_gradient.h"
#include "eft_avx2_tile.h"

#if EFT_AVX2

/** Pixels of a line where rows need not be told apart. */
#define EFT_GRAD_PIXELS 24

/** Most runs of a line, and most places of a kernel. */
#define EFT_GRAD_RUNS 128

/** Weights by pairs of output channels; place (ky, kx) has pairs [(ky * kernel_w + kx) * pairs, ...) of each panel. */
static inline void eft_pack_input_grad(const eft_conv_shape *s, const eft_weights *weights, int32_t pairs, int16_t *panels)
{
    const int32_t taps = s->kernel_h * s->kernel_w;
    for (int32_t first = 0; first < s->in_c; first += EFT_LANES) {
        const int32_t columns = eft_least(EFT_LANES, s->in_c - first);
        int16_t *b = panels + (ptrdiff_t)2 * first * taps * pairs;
        for (int32_t tap = 0; tap < taps; tap++) {
            for (int32_t o = 0; o < s->out_c; o += 2) {
                const __m128i x = eft_weight_lanes(weights, s->in_c, o * taps + tap, first, columns);
                const __m128i z = o + 1 < s->out_c ? eft_weight_lanes(weights, s->in_c, (o + 1) * taps + tap, first, columns)
                                                   : _mm_setzero_si128();
                eft_pack_pair(x, z, _mm256_setzero_si256(), columns, b);
                b += 2 * eft_panel_lanes(columns);
            }
        }
    }
}

/** Input places [0, pixels) of a line, step apart, all channels; index is that of the first. */
static inline void eft_input_grad_line(const eft_rows16 *a, const int16_t *panels, int32_t pairs, const eft_run *runs,
                                       int32_t num_runs, int32_t shift, int32_t pixels, int32_t step, int32_t in_c,
                                       const uint8_t *mask, int32_t index, int16_t *gx, __m256i *seen)
{
    const int32_t zeros[EFT_LANES] = {0};
    for (int32_t first = 0; first < in_c; first += EFT_LANES) {
        const int32_t columns = eft_least(EFT_LANES, in_c - first);
        eft_rows16 rows = *a;
        for (int32_t pixel = 0; pixel < pixels;) {
            const int32_t n = eft_tile_rows(pixels - pixel);
            int32_t sums[EFT_TILE * EFT_LANES];
            eft_tile(n, columns, &rows, panels + (ptrdiff_t)2 * first * pairs, runs, num_runs, zeros, 0, sums);
            for (int32_t i = 0; i < n; i++) {
                const int32_t at = index + (pixel + i) * step * in_c + first;
                eft_store_lanes(sums + i * EFT_LANES, columns, shift, mask, at, gx, seen);
            }
            pixel += n;
            rows.at += n * a->row;
        }
    }
}

/**
 * eft_conv_input_grad_s16, as far as what is prepared fits.
 *
 * @return The bits of gx; -1 if it does not fit, and then nothing was written
 */
static inline int32_t eft_conv_input_grad_avx2(const int16_t *g, int32_t g_bits, const eft_conv_shape *shape,
                                               const eft_weights *weights, const eft_input_grad *constants,
                                               const uint8_t *x_mask, int16_t *gx)
{
    const eft_conv_shape *s = shape;
    const int32_t shift = 15 - (constants->operand_bits - g_bits);
    const int32_t taps = s->kernel_h * s->kernel_w;
    const int flat = eft_in_place(s);
    const int32_t pairs = (s->out_c + 1) / 2;
    eft_grad_lines lines = eft_grad_lines_of(s);
    const int32_t per_column = lines.before + 1;
    int16_t panels[EFT_PANELS], h[EFT_LINES + 1];
    eft_run runs[EFT_GRAD_RUNS];
    __m256i seen = _mm256_setzero_si256();
    if (s->in_h * s->in_w < 4 || lines.lines * per_column > EFT_GRAD_RUNS || taps * s->out_c > EFT_PANELS / 16 ||
        (flat ? EFT_GRAD_PIXELS * s->out_c : lines.lines * lines.line) > EFT_LINES ||
        eft_panels_size(s->in_c, taps * pairs) > EFT_PANELS) {
        return -1;
    }
    eft_pack_input_grad(s, weights, pairs, panels);
    if (flat) {
        const eft_rows16 a = {h, s->out_c, 2};
        const eft_run all = {0, 0, pairs};
        int32_t index = 0;
        for (int32_t left = s->in_h * s->in_w; left > 0; left -= EFT_GRAD_PIXELS) {
            const int32_t n = eft_least(EFT_GRAD_PIXELS, left);
            eft_scale_gradients(g, n, s->out_c, constants->channel_scale, shift, h);
            h[n * s->out_c] = 0;
            eft_input_grad_line(&a, panels, pairs, &all, 1, constants->shift, n, 1, s->in_c, x_mask, index, gx, &seen);
            g += n * s->out_c;
            index += n * s->in_c;
        }
        return eft_bit_length(eft_all_bits(seen));
    }
    h[lines.lines * lines.line] = 0;
    for (int32_t iy = 0; iy < s->in_h; iy++) {
        const int32_t y = iy + s->pad_h;
        eft_scale_rows(&lines, y / s->stride_h, g, s, constants->channel_scale, shift, h);
        for (int32_t ix = 0; ix < s->stride_w && ix < s->in_w; ix++) {
            /* The places of the input that see the output through the same places of the kernel. */
            const int32_t x = ix + s->pad_w;
            const int32_t pixels = (s->in_w - 1 - ix) / s->stride_w + 1;
            const eft_rows16 a = {h + (x / s->stride_w + lines.before) * s->out_c, s->out_c, 2};
            int32_t num_runs = 0;
            for (int32_t ky = y % s->stride_h; ky < s->kernel_h; ky += s->stride_h) {
                const int32_t oy = (y - ky) / s->stride_h;
                if (y < ky || oy >= s->out_h) {
                    continue;
                }
                for (int32_t kx = x % s->stride_w; kx < s->kernel_w; kx += s->stride_w) {
                    const int32_t at = eft_grad_line(&lines, oy) - kx / s->stride_w * s->out_c;
                    const eft_run run = {at, (ky * s->kernel_w + kx) * pairs, pairs};
                    runs[num_runs++] = run;
                }
            }
            eft_input_grad_line(&a, panels, taps * pairs, runs, num_runs, constants->shift, pixels, s->stride_w, s->in_c,
                                x_mask, (iy * s->in_w + ix) * s->in_c, gx, &seen);
        }
    }
    return eft_bit_length(eft_all_bits(seen));
}

#endif

#endif

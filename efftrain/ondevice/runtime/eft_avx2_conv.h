/** Dense convolutions with AVX2. Not part of the contract. */
#ifndef EFT_AVX2_CONV_H
#define EFT_AVX2_CONV_H

#include "eft_avx2_requantize.h"
#include "eft_avx2_tile.h"

#if EFT_AVX2

/** Pixels of a line where rows need not be told apart. */
#define EFT_LINE_PIXELS 24

/** Most runs of one call. */
#define EFT_RUNS 128

/** One line of output pixels, all channels. The lines of the input begin at a->at. */
static inline void eft_conv_line(const eft_rows16 *a, const int16_t *panels, int32_t pairs, const eft_run *runs,
                                 int32_t num_runs, const int32_t *bias, const eft_requantize *out, int32_t pixels,
                                 int32_t out_c, int8_t *y, uint8_t *mask, int32_t index)
{
    for (int32_t o = 0; o < out_c; o += EFT_LANES) {
        const int32_t columns = eft_least(EFT_LANES, out_c - o);
        const eft_lane_factors factors = eft_factors_of(out, bias, o, columns);
        eft_rows16 rows = *a;
        for (int32_t pixel = 0; pixel < pixels;) {
            const int32_t n = eft_tile_rows(pixels - pixel);
            int32_t sums[EFT_TILE * EFT_LANES];
            eft_tile(n, columns, &rows, panels + (ptrdiff_t)2 * o * pairs, runs, num_runs, factors.bias, 0, sums);
            for (int32_t i = 0; i < n; i++) {
                const int32_t at = (pixel + i) * out_c + o;
                eft_requantize_lanes(sums + i * EFT_LANES, &factors, out, columns, y + at, mask, index + at);
            }
            pixel += n;
            rows.at += n * a->row;
        }
    }
}

/**
 * eft_conv_s8, as far as what is prepared fits.
 *
 * @return 0 if it does not; then nothing was written
 */
static inline int eft_conv_avx2(const int8_t *x, const eft_conv_shape *shape, int32_t x_zero_point, const eft_weights *weights,
                                const int32_t *bias, const eft_requantize *out, const eft_rows *where, int8_t *y, uint8_t *mask)
{
    const eft_conv_shape *s = shape;
    const int32_t taps = s->kernel_h * s->kernel_w;
    const int32_t trained_c = weights->trained_c;
    const int split = trained_c > 0 && trained_c < s->in_c;
    const int32_t per_row = split ? 2 * s->kernel_w : 1;
    const int32_t line = eft_line_of(s);
    const int flat = eft_in_place(s) && where->ring == s->in_h;
    const int32_t pixels = flat ? where->count * s->out_w : s->out_w;
    int16_t panels[EFT_PANELS], lines[EFT_LINES + 1];
    eft_run runs[EFT_RUNS];
    int32_t num_runs = 0, pairs = 0;
    if (s->kernel_h * per_row > EFT_RUNS || where->count * s->out_w < 4 || (flat ? EFT_LINE_PIXELS * s->in_c : s->kernel_h * line) > EFT_LINES ||
        s->in_c * taps > EFT_PANELS / 16) {
        return 0;
    }
    for (int32_t ky = 0; ky < s->kernel_h; ky++) {
        for (int32_t number = 0; number < per_row; number++) {
            const int32_t first = split && (number & 1) != 0 ? trained_c : 0;
            const int32_t length = split ? ((number & 1) != 0 ? s->in_c - trained_c : trained_c) : s->kernel_w * s->in_c;
            const eft_run run = {(number >> 1) * s->in_c + first, pairs, (length + 1) / 2};
            runs[num_runs++] = run;
            pairs += run.pairs;
        }
    }
    if (eft_panels_size(s->out_c, pairs) > EFT_PANELS) {
        return 0;
    }
    for (int32_t o = 0; o < s->out_c; o += EFT_LANES) {
        const int32_t columns = eft_least(EFT_LANES, s->out_c - o);
        int16_t *const b = panels + (ptrdiff_t)2 * o * pairs;
        for (int32_t number = 0; number < num_runs; number++) {
            const int frozen = split ? (number & 1) != 0 : trained_c == 0;
            const int32_t part_c = frozen ? s->in_c - trained_c : trained_c;
            const int32_t length = split ? part_c : s->kernel_w * part_c;
            const int8_t *const w = (frozen ? weights->frozen : weights->trained) + (ptrdiff_t)o * taps * part_c;
            eft_pack_rows(w + (split ? number >> 1 : number) * length, (ptrdiff_t)taps * part_c, columns, length,
                          runs[number].b, b);
        }
    }
    lines[EFT_LINES] = 0;
    if (flat) {
        const int8_t *from = x + (ptrdiff_t)where->first * s->in_w * s->in_c;
        const eft_rows16 a = {lines, s->in_c, 2};
        int32_t index = where->first * s->out_w * s->out_c;
        for (int32_t left = pixels; left > 0; left -= EFT_LINE_PIXELS) {
            const int32_t n = eft_least(EFT_LINE_PIXELS, left);
            eft_widen(from, n * s->in_c, x_zero_point, lines);
            lines[n * s->in_c] = 0;
            eft_conv_line(&a, panels, pairs, runs, num_runs, bias, out, n, s->out_c, y, mask, index);
            from += n * s->in_c;
            y += n * s->out_c;
            index += n * s->out_c;
        }
        return 1;
    }
    int32_t loaded = where->first * s->stride_h; /* Rows of the padded input */
    lines[s->kernel_h * line] = 0;
    for (int32_t oy = where->first; oy < where->first + where->count; oy++) {
        const eft_rows16 a = {lines, s->stride_w * s->in_c, 2};
        const int32_t top = oy * s->stride_h;
        const int32_t at = oy * s->out_w * s->out_c;
        for (loaded = loaded > top ? loaded : top; loaded < top + s->kernel_h; loaded++) {
            eft_load_line(x, s, where->ring, loaded, x_zero_point, line, lines);
        }
        for (int32_t number = 0; number < num_runs; number++) {
            const int32_t in_row = number % per_row;
            const int32_t first = split && (in_row & 1) != 0 ? trained_c : 0;
            runs[number].a = ((top + number / per_row) % s->kernel_h) * line + (in_row >> 1) * s->in_c + first;
        }
        eft_conv_line(&a, panels, pairs, runs, num_runs, bias, out, s->out_w, s->out_c, y, mask, at);
        y += s->out_w * s->out_c;
    }
    return 1;
}

#endif

#endif

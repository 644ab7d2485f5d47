/** What the gradient of one place of a kernel is made of. Not part of the contract. */
#ifndef EFT_SEEN_H
#define EFT_SEEN_H

#include "eft_internal.h"

/** The outputs whose windows have a place of the kernel on the input. */
typedef struct {
    const int16_t *g; /**< The first, channel 0 */
    const int8_t *x;  /**< What it sees there, channel 0 */
    int32_t rows, columns;
    int32_t g_row, g_column, x_row, x_column; /**< Distances */
} eft_seen;

static inline eft_seen eft_seen_through(const int8_t *x, const int16_t *g, const eft_conv_shape *s, int32_t ky, int32_t kx)
{
    /* Of the outputs in a row or column, the first and the one after the last that see input 0 or more, and less than all. */
    const int32_t first_y = s->pad_h > ky ? (s->pad_h - ky + s->stride_h - 1) / s->stride_h : 0;
    const int32_t first_x = s->pad_w > kx ? (s->pad_w - kx + s->stride_w - 1) / s->stride_w : 0;
    const int32_t reach_y = s->in_h + s->pad_h - ky - 1;
    const int32_t reach_x = s->in_w + s->pad_w - kx - 1;
    const int32_t end_y = reach_y < 0 ? 0 : eft_end_output(reach_y, s->stride_h, s->out_h);
    const int32_t end_x = reach_x < 0 ? 0 : eft_end_output(reach_x, s->stride_w, s->out_w);
    const int some = end_y > first_y && end_x > first_x;
    eft_seen seen;
    seen.rows = some ? end_y - first_y : 0;
    seen.columns = some ? end_x - first_x : 0;
    seen.g_column = s->out_c;
    seen.g_row = s->out_w * s->out_c;
    seen.x_column = s->stride_w * s->in_c;
    seen.x_row = s->stride_h * s->in_w * s->in_c;
    seen.g = some ? g + first_y * seen.g_row + first_x * seen.g_column : g;
    seen.x = some ? x + ((first_y * s->stride_h - s->pad_h + ky) * s->in_w + first_x * s->stride_w - s->pad_w + kx) * s->in_c : x;
    if (seen.g_row == seen.columns * seen.g_column && seen.x_row == seen.columns * seen.x_column) {
        /* All rows are one. */
        seen.columns *= seen.rows;
        seen.rows = 1;
    }
    return seen;
}

/** Sums at a time. */
#define EFT_SUMS 64

/** How the trained weights of one row of a dense kernel are taken: in runs whose inputs lie together for the same outputs. */
typedef struct {
    int32_t per_row, length;
} eft_runs;

static inline eft_runs eft_runs_of(const eft_conv_shape *s, int32_t trained_c)
{
    /* A whole row of the kernel, if all its places are on the input for all outputs. */
    const int inside = s->pad_w == 0 && (s->out_w - 1) * s->stride_w + s->kernel_w <= s->in_w;
    eft_runs runs = {s->kernel_w, trained_c};
    if (inside && trained_c == s->in_c) {
        runs.per_row = 1;
        runs.length = s->kernel_w * trained_c;
    }
    return runs;
}

#endif

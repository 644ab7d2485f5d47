#ifndef EFT_CONV_ROW_F32_H
#define EFT_CONV_ROW_F32_H

#include "eft_f32.h"

/** Some pixels of a row, `together` vectors of channels of each; arguments as for eft_conv_row_f32, from the first. */
EFT_KERNEL void eft_conv_pixels_f32(const float *x, int32_t x_row, int32_t step, const float *taps, int32_t kernel_h,
                                    int32_t row, const float *bias, float *y, int32_t channels, int32_t pixels,
                                    int32_t together, int32_t clamped, float high)
{
    eft_v8 sum[16];
    EFT_UNROLL
    for (int32_t v = 0; v < together; v++) {
        EFT_UNROLL
        for (int32_t p = 0; p < pixels; p++) {
            sum[p * together + v] = eft_load_f32(bias + EFT_LANES * v);
        }
    }
    for (int32_t ky = 0; ky < kernel_h; ky++) {
        const float *from = x + ky * x_row;
        const float *tap = taps + ky * row * channels;
        for (int32_t t = 0; t < row; t++) {
            eft_v8 weight[4];
            EFT_UNROLL
            for (int32_t v = 0; v < together; v++) {
                weight[v] = eft_load_f32(tap + t * channels + EFT_LANES * v);
            }
            EFT_UNROLL
            for (int32_t p = 0; p < pixels; p++) {
                const float value = from[p * step + t];
                EFT_UNROLL
                for (int32_t v = 0; v < together; v++) {
                    sum[p * together + v] += value * weight[v];
                }
            }
        }
    }
    EFT_UNROLL
    for (int32_t p = 0; p < pixels; p++) {
        EFT_UNROLL
        for (int32_t v = 0; v < together; v++) {
            const eft_v8 value = sum[p * together + v];
            eft_store_f32(y + p * channels + EFT_LANES * v, clamped ? eft_clamp_f32(value, high) : value);
        }
    }
}

/** The same in pairs of vectors; together is even. */
EFT_KERNEL void eft_conv_pixels_in_pairs_f32(const float *x, int32_t x_row, int32_t step, const float *taps,
                                             int32_t kernel_h, int32_t row, const float *bias, float *y,
                                             int32_t channels, int32_t pixels, int32_t together, int32_t clamped,
                                             float high)
{
    const int32_t pairs = together / 2;
    eft_v16 sum[16];
    EFT_UNROLL
    for (int32_t v = 0; v < pairs; v++) {
        EFT_UNROLL
        for (int32_t p = 0; p < pixels; p++) {
            sum[p * pairs + v] = eft_load_pair_f32(bias + 2 * EFT_LANES * v);
        }
    }
    for (int32_t ky = 0; ky < kernel_h; ky++) {
        const float *from = x + ky * x_row;
        const float *tap = taps + ky * row * channels;
        for (int32_t t = 0; t < row; t++) {
            eft_v16 weight[2];
            EFT_UNROLL
            for (int32_t v = 0; v < pairs; v++) {
                weight[v] = eft_load_pair_f32(tap + t * channels + 2 * EFT_LANES * v);
            }
            EFT_UNROLL
            for (int32_t p = 0; p < pixels; p++) {
                const float value = from[p * step + t];
                EFT_UNROLL
                for (int32_t v = 0; v < pairs; v++) {
                    sum[p * pairs + v] += value * weight[v];
                }
            }
        }
    }
    EFT_UNROLL
    for (int32_t p = 0; p < pixels; p++) {
        EFT_UNROLL
        for (int32_t v = 0; v < pairs; v++) {
            eft_v8 half[2];
            memcpy(half, &sum[p * pairs + v], sizeof half);
            float *to = y + p * channels + 2 * EFT_LANES * v;
            eft_store_f32(to, clamped ? eft_clamp_f32(half[0], high) : half[0]);
            eft_store_f32(to + EFT_LANES, clamped ? eft_clamp_f32(half[1], high) : half[1]);
        }
    }
}

/**
 * One row of outputs of a convolution, pixels x vectors of channels at a time.
 *
 *   y[p][o] = bias[o] + sum_ky,t x[ky][p * step + t] * taps[ky][t][o]
 *
 * @param[in]  x        First tap of the first output, inside a border of zeros
 * @param[in]  x_row    Floats from one row of x to the next
 * @param[in]  step     Floats of x from one output to the next: stride times channels
 * @param[in]  taps     [kernel_h][row][8 * vectors]
 * @param[in]  row      Floats that a row of the kernel covers: its width times channels
 * @param[in]  bias     [8 * vectors]
 * @param[out] y        [width][8 * vectors]
 * @param[in]  pixels   Outputs at a time, at most width; pixels * together <= 16. In pairs, up to twice as many
 * @param[in]  together Vectors at a time, a divisor of vectors, at most 4
 * @param[in]  clamped  Whether y is clamped to [0, high]
 */
EFT_KERNEL void eft_conv_row_f32(const float *x, int32_t x_row, int32_t step, const float *taps, int32_t kernel_h,
                                 int32_t row, const float *bias, float *y, int32_t width, int32_t vectors,
                                 int32_t pixels, int32_t together, int32_t clamped, float high)
{
    const int32_t channels = EFT_LANES * vectors;
    const int32_t in_pairs = EFT_PAIRS && together % 2 == 0;
    const int32_t room = in_pairs ? 2 * pixels : pixels;
    const int32_t each = room < width ? room : width;
    for (int32_t o = 0; o < channels; o += EFT_LANES * together) {
        for (int32_t begin = 0; begin < width; begin += each) {
            /* The last block starts early where `each` does not divide width: some outputs are computed twice. */
            const int32_t at = begin + each <= width ? begin : width - each;
            if (in_pairs) {
                eft_conv_pixels_in_pairs_f32(x + at * step, x_row, step, taps + o, kernel_h, row, bias + o,
                                             y + at * channels + o, channels, each, together, clamped, high);
            } else {
                eft_conv_pixels_f32(x + at * step, x_row, step, taps + o, kernel_h, row, bias + o,
                                    y + at * channels + o, channels, each, together, clamped, high);
            }
        }
    }
}

#endif

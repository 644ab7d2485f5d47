#ifndef EFT_CONV_ROW_F32_H
#define EFT_CONV_ROW_F32_H

#include "eft_f32.h"

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
 * @param[in]  pixels   Outputs at a time, at most width; pixels * together <= 16
 * @param[in]  together Vectors at a time, a divisor of vectors
 * @param[in]  clamped  Whether y is clamped to [0, high]
 */
EFT_KERNEL void eft_conv_row_f32(const float *x, int32_t x_row, int32_t step, const float *taps, int32_t kernel_h,
                                 int32_t row, const float *bias, float *y, int32_t width, int32_t vectors,
                                 int32_t pixels, int32_t together, int32_t clamped, float high)
{
    const int32_t channels = EFT_LANES * vectors;
    for (int32_t first = 0; first < vectors; first += together) {
        for (int32_t begin = 0; begin < width; begin += pixels) {
            /* The last block starts early where pixels does not divide width: some outputs are computed twice. */
            const int32_t at = begin + pixels <= width ? begin : width - pixels;
            eft_v8 sum[16];
            EFT_UNROLL
            for (int32_t v = 0; v < together; v++) {
                EFT_UNROLL
                for (int32_t p = 0; p < pixels; p++) {
                    sum[p * together + v] = eft_load_f32(bias + EFT_LANES * (first + v));
                }
            }
            for (int32_t ky = 0; ky < kernel_h; ky++) {
                const float *from = x + ky * x_row + at * step;
                const float *tap = taps + ky * row * channels + EFT_LANES * first;
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
                    eft_store_f32(y + (at + p) * channels + EFT_LANES * (first + v),
                                  clamped ? eft_clamp_f32(value, high) : value);
                }
            }
        }
    }
}

#endif

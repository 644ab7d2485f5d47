/** Gradients with respect to the weights of a dense layer. Not part of the contract. */
#ifndef EFT_CONV_WEIGHT_SUMS_H
#define EFT_CONV_WEIGHT_SUMS_H

#include "eft_dsp.h"
#include "eft_seen.h"

#if EFT_DSP

/** Four input channels and one output channel. */
static inline void eft_four_weight_sums(const eft_seen *seen, const int16_t *g, const int8_t *x, uint32_t plus, int32_t cut,
                                        int32_t *sums)
{
    const int32_t half = cut > 0 ? 1 << (cut - 1) : 0;
    int32_t s0 = 0, s1 = 0, s2 = 0, s3 = 0;
    for (int32_t y = seen->rows; y > 0; y--) {
        const int16_t *value = g;
        const int8_t *pixel = x;
        for (int32_t column = seen->columns; column > 0; column--) {
            const uint32_t four = eft_load4(pixel);
            const uint32_t h = (uint32_t)((*value + half) >> cut);
            const uint32_t even = eft_even(four, plus);
            const uint32_t odd = eft_odd(four, plus);
            s0 = eft_smlabb(h, even, s0);
            s1 = eft_smlabb(h, odd, s1);
            s2 = eft_smlabt(h, even, s2);
            s3 = eft_smlabt(h, odd, s3);
            value += seen->g_column;
            pixel += seen->x_column;
        }
        g += seen->g_row;
        x += seen->x_row;
    }
    sums[0] = s0;
    sums[1] = s1;
    sums[2] = s2;
    sums[3] = s3;
}

#endif

/** sums[i] = sum over pixels of gradient * input, for output channel o and input channels [0, count). */
static EFT_OUT_OF_LINE void eft_conv_weight_sums(const eft_seen *seen, int32_t x_zero_point, int32_t cut, int32_t o, int32_t count,
                                                 int32_t *sums)
{
    int32_t done = 0;
#if EFT_DSP
    for (; done + 4 <= count; done += 4) {
        eft_four_weight_sums(seen, seen->g + o, seen->x + done, eft_minus(x_zero_point), cut, sums + done);
    }
    if (done == count) {
        return;
    }
#endif
    for (int32_t i = done; i < count; i++) {
        sums[i] = 0;
    }
    for (int32_t y = 0; y < seen->rows; y++) {
        const int16_t *value = seen->g + y * seen->g_row + o;
        const int8_t *pixel = seen->x + y * seen->x_row;
        for (int32_t column = 0; column < seen->columns; column++) {
            const int32_t h = eft_rsh32(*value, cut);
            for (int32_t i = done; i < count; i++) {
                sums[i] += h * ((int32_t)pixel[i] - x_zero_point);
            }
            value += seen->g_column;
            pixel += seen->x_column;
        }
    }
}

#endif

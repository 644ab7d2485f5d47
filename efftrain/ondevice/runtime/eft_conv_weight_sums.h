/** Gradients with respect to the weights of a dense layer, or of a group of one, and their steps. Not part of the contract. */
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

/** The same for input channels [first, count). */
static inline void eft_rest_weight_sums(const eft_seen *seen, int32_t x_zero_point, int32_t cut, int32_t o, int32_t first,
                                        int32_t count, int32_t *restrict sums)
{
    for (int32_t i = first; i < count; i++) {
        sums[i] = 0;
    }
    for (int32_t y = 0; y < seen->rows; y++) {
        const int16_t *value = seen->g + y * seen->g_row + o;
        const int8_t *pixel = seen->x + y * seen->x_row;
        int32_t column = 0;
        for (; column + 4 <= seen->columns; column += 4) {
            /* All fit 16 bits, which is what vector units multiply. */
            const int16_t h0 = (int16_t)eft_rsh32(value[0], cut);
            const int16_t h1 = (int16_t)eft_rsh32(value[seen->g_column], cut);
            const int16_t h2 = (int16_t)eft_rsh32(value[2 * seen->g_column], cut);
            const int16_t h3 = (int16_t)eft_rsh32(value[3 * seen->g_column], cut);
            const int8_t *const second = pixel + seen->x_column;
            const int8_t *const third = second + seen->x_column;
            const int8_t *const fourth = third + seen->x_column;
            for (int32_t i = first; i < count; i++) {
                sums[i] += h0 * (int16_t)(pixel[i] - x_zero_point) + h1 * (int16_t)(second[i] - x_zero_point) +
                           h2 * (int16_t)(third[i] - x_zero_point) + h3 * (int16_t)(fourth[i] - x_zero_point);
            }
            value += 4 * seen->g_column;
            pixel += 4 * seen->x_column;
        }
        for (; column < seen->columns; column++) {
            const int16_t h = (int16_t)eft_rsh32(*value, cut);
            for (int32_t i = first; i < count; i++) {
                sums[i] += h * (int16_t)(pixel[i] - x_zero_point);
            }
            value += seen->g_column;
            pixel += seen->x_column;
        }
    }
}

/** sums[i] = sum over pixels of gradient * input, for input channels [0, count) and output channel o. */
static EFT_OUT_OF_LINE void eft_conv_weight_sums(const eft_seen *seen, int32_t x_zero_point, int32_t cut, int32_t o, int32_t count,
                                                 int32_t *sums)
{
    int32_t done = 0;
#if EFT_DSP
    for (; done + 4 <= count; done += 4) {
        eft_four_weight_sums(seen, seen->g + o, seen->x + done, eft_minus(x_zero_point), cut, sums + done);
    }
#endif
    if (done < count) {
        eft_rest_weight_sums(seen, x_zero_point, cut, o, done, count, sums);
    }
}

/** Move some weights of output channel o, the first of which is weight number index. */
static inline void eft_move_masters(const int32_t *sums, int32_t count, const eft_factors *rate, int32_t o, int32_t exponent,
                                    const eft_optimizer *optimizer, int32_t index, int8_t *trained, int8_t *residual)
{
    const int32_t multiplier = rate->multiplier[o];
    const int32_t shift = rate->shift[o] - exponent - 16 + optimizer->lr_shift;
    for (int32_t i = 0; i < count; i++) {
        const int64_t step = eft_optimized(optimizer, index + i, eft_rsh((int64_t)sums[i] * multiplier, shift));
        eft_move_master(trained + i, residual + i, step);
    }
}

/** The same without residuals; the first is weight number first_index of the model. */
static inline void eft_move_stochastics(const int32_t *sums, int32_t count, const eft_factors *rate, int32_t o, int32_t exponent,
                                        const eft_optimizer *optimizer, int32_t index, int8_t *trained, uint32_t key,
                                        uint32_t first_index)
{
    const int32_t multiplier = rate->multiplier[o];
    const int32_t shift = rate->shift[o] - exponent - 16 + optimizer->lr_shift;
    for (int32_t i = 0; i < count; i++) {
        const int64_t step = eft_optimized(optimizer, index + i, eft_rsh((int64_t)sums[i] * multiplier, shift));
        eft_move_stochastic(trained + i, step, key, first_index + (uint32_t)i);
    }
}

#endif

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

#if EFT_SSE

/** Four output channels and eight input channels, two pixels at a time. */
static inline void eft_four_by_eight_weight_sums(const eft_seen *seen, const int16_t *g, const int8_t *x, int32_t x_zero_point,
                                                 int32_t cut, int32_t *sums)
{
    const __m128i minus = _mm_set1_epi16((int16_t)x_zero_point);
    __m128i low[4], high[4];
    for (int32_t k = 0; k < 4; k++) {
        low[k] = _mm_setzero_si128();
        high[k] = _mm_setzero_si128();
    }
    for (int32_t y = 0; y < seen->rows; y++) {
        const int16_t *value = g + y * seen->g_row;
        const int8_t *pixel = x + y * seen->x_row;
        for (int32_t column = 0; column < seen->columns; column += 2) {
            const int two = column + 1 < seen->columns;
            const __m128i first = _mm_loadl_epi64((const __m128i *)(const void *)value);
            const __m128i second =
                two ? _mm_loadl_epi64((const __m128i *)(const void *)(value + seen->g_column)) : _mm_setzero_si128();
            const __m128i h = eft_rsh_eight(_mm_unpacklo_epi16(first, second), cut);
            const __m128i a = eft_eight(pixel, minus);
            const __m128i b = two ? eft_eight(pixel + seen->x_column, minus) : a;
            const __m128i lower = _mm_unpacklo_epi16(a, b);
            const __m128i upper = _mm_unpackhi_epi16(a, b);
            const __m128i h0 = _mm_shuffle_epi32(h, 0x00), h1 = _mm_shuffle_epi32(h, 0x55);
            const __m128i h2 = _mm_shuffle_epi32(h, 0xAA), h3 = _mm_shuffle_epi32(h, 0xFF);
            low[0] = _mm_add_epi32(low[0], _mm_madd_epi16(lower, h0));
            low[1] = _mm_add_epi32(low[1], _mm_madd_epi16(lower, h1));
            low[2] = _mm_add_epi32(low[2], _mm_madd_epi16(lower, h2));
            low[3] = _mm_add_epi32(low[3], _mm_madd_epi16(lower, h3));
            high[0] = _mm_add_epi32(high[0], _mm_madd_epi16(upper, h0));
            high[1] = _mm_add_epi32(high[1], _mm_madd_epi16(upper, h1));
            high[2] = _mm_add_epi32(high[2], _mm_madd_epi16(upper, h2));
            high[3] = _mm_add_epi32(high[3], _mm_madd_epi16(upper, h3));
            value += 2 * seen->g_column;
            pixel += 2 * seen->x_column;
        }
    }
    for (int32_t k = 0; k < 4; k++) {
        _mm_storeu_si128((__m128i *)(void *)(sums + k * EFT_SUMS), low[k]);
        _mm_storeu_si128((__m128i *)(void *)(sums + k * EFT_SUMS + 4), high[k]);
    }
}

/** Four output channels and one input channel. */
static inline void eft_four_by_one_weight_sums(const eft_seen *seen, const int16_t *g, const int8_t *x, int32_t x_zero_point,
                                               int32_t cut, int32_t *sums)
{
    __m128i total = _mm_setzero_si128();
    for (int32_t y = 0; y < seen->rows; y++) {
        const int16_t *value = g + y * seen->g_row;
        const int8_t *pixel = x + y * seen->x_row;
        for (int32_t column = 0; column < seen->columns; column += 2) {
            const int two = column + 1 < seen->columns;
            const __m128i first = _mm_loadl_epi64((const __m128i *)(const void *)value);
            const __m128i second =
                two ? _mm_loadl_epi64((const __m128i *)(const void *)(value + seen->g_column)) : _mm_setzero_si128();
            const uint32_t a = (uint32_t)(*pixel - x_zero_point);
            const uint32_t b = two ? (uint32_t)(pixel[seen->x_column] - x_zero_point) : 0U;
            const __m128i both = _mm_set1_epi32((int32_t)((a & 0xFFFFU) | b << 16));
            total = _mm_add_epi32(total, _mm_madd_epi16(eft_rsh_eight(_mm_unpacklo_epi16(first, second), cut), both));
            value += 2 * seen->g_column;
            pixel += 2 * seen->x_column;
        }
    }
    int32_t found[4];
    _mm_storeu_si128((__m128i *)(void *)found, total);
    for (int32_t k = 0; k < 4; k++) {
        sums[k * EFT_SUMS] = found[k];
    }
}

#endif

/**
 * sums[i] = sum over pixels of gradient * input, for input channels [0, count) and output channel o; further output channels have
 * their sums EFT_SUMS behind.
 */
static EFT_OUT_OF_LINE void eft_conv_weight_sums(const eft_seen *seen, int32_t x_zero_point, int32_t cut, int32_t o,
                                                 int32_t outputs, int32_t count, int32_t *sums)
{
    int32_t done = 0;
#if EFT_DSP
    for (; done + 4 <= count; done += 4) {
        eft_four_weight_sums(seen, seen->g + o, seen->x + done, eft_minus(x_zero_point), cut, sums + done);
    }
#elif EFT_SSE
    if (outputs == 4) {
        for (; done + 8 <= count; done += 8) {
            eft_four_by_eight_weight_sums(seen, seen->g + o, seen->x + done, x_zero_point, cut, sums + done);
        }
        for (; done < count; done++) {
            eft_four_by_one_weight_sums(seen, seen->g + o, seen->x + done, x_zero_point, cut, sums + done);
        }
    }
#endif
    if (done < count) {
        for (int32_t k = 0; k < outputs; k++) {
            eft_rest_weight_sums(seen, x_zero_point, cut, o + k, done, count, sums + k * EFT_SUMS);
        }
    }
}

#endif

/**
 * Products of two matrices, a few rows and EFT_LANES columns at a time: what convolutions, their input gradients and their weight
 * gradients have in common. int16 by pairs, sums of int32. Not part of the contract.
 */
#ifndef EFT_AVX2_TILE_H
#define EFT_AVX2_TILE_H

#include "eft_avx2.h"

#if EFT_AVX2

/** Most rows at a time: with 16 registers, 12 for sums. */
#define EFT_TILE 6

/** int16 of all panels of one call. */
#define EFT_PANELS 65536

/** Pairs that lie behind one another in a row of the first matrix and in a panel of the second. */
typedef struct {
    int32_t a; /**< Distance of the first from the row's start, in int16 */
    int32_t b; /**< Number of the first in the panel */
    int32_t pairs;
} eft_run;

/** The first matrix. */
typedef struct {
    const int16_t *at;
    ptrdiff_t row, pair; /**< Distances, in int16 */
} eft_rows16;

/** The columns of a panel: [pair][lanes][2]. */
EFT_INLINE int32_t eft_panel_lanes(int32_t columns)
{
    return columns > 8 ? 16 : 8;
}

/** int16 of panels for so many columns and pairs. */
static inline int32_t eft_panels_size(int32_t columns, int32_t pairs)
{
    return (columns + 7) / 8 * 8 * 2 * pairs;
}

/** sums[r] = from[r] + row r * panel. from and sums have EFT_LANES columns; from_step is 0 if all rows begin with the same. */
EFT_INLINE void eft_fixed_tile(int rows, int wide, const eft_rows16 *a, const int16_t *b, const eft_run *runs, int32_t num_runs,
                               const int32_t *from, ptrdiff_t from_step, int32_t *sums)
{
    __m256i low[EFT_TILE], high[EFT_TILE];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
        low[r] = eft_load256(from + r * from_step);
        high[r] = eft_load256(from + r * from_step + 8);
    }
    for (const eft_run *run = runs; run != runs + num_runs; run++) {
        const int16_t *at = a->at + run->a;
        const int16_t *weights = b + (ptrdiff_t)run->b * (wide ? 32 : 16);
        for (int32_t left = run->pairs; left > 0; left--) {
            const __m256i first = eft_load256(weights);
            const __m256i second = eft_load256(wide ? weights + 16 : weights);
#pragma GCC unroll 6
            for (int r = 0; r < rows; r++) {
                int32_t pair;
                memcpy(&pair, at + r * a->row, 4);
                const __m256i both = _mm256_set1_epi32(pair);
                low[r] = _mm256_add_epi32(low[r], _mm256_madd_epi16(both, first));
                if (wide) {
                    high[r] = _mm256_add_epi32(high[r], _mm256_madd_epi16(both, second));
                }
            }
            at += a->pair;
            weights += wide ? 32 : 16;
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
        eft_store256(sums + r * EFT_LANES, low[r]);
        eft_store256(sums + r * EFT_LANES + 8, high[r]);
    }
}

/** The same for 1 to EFT_TILE rows and 1 to EFT_LANES columns. */
static EFT_OUT_OF_LINE void eft_tile(int32_t rows, int32_t columns, const eft_rows16 *a, const int16_t *b, const eft_run *runs,
                                     int32_t num_runs, const int32_t *from, ptrdiff_t from_step, int32_t *sums)
{
#define EFT_CASE(ROWS)                                                                                                             \
    case ROWS:                                                                                                                     \
        if (columns > 8) {                                                                                                         \
            eft_fixed_tile(ROWS, 1, a, b, runs, num_runs, from, from_step, sums);                                                  \
        } else {                                                                                                                   \
            eft_fixed_tile(ROWS, 0, a, b, runs, num_runs, from, from_step, sums);                                                  \
        }                                                                                                                          \
        break
    switch (rows) {
        EFT_CASE(1);
        EFT_CASE(2);
        EFT_CASE(3);
        EFT_CASE(4);
        EFT_CASE(5);
    default:
        EFT_CASE(6);
    }
#undef EFT_CASE
}

/** Rows of the next tile, so that the last is not much smaller than the others. */
static inline int32_t eft_tile_rows(int32_t rows_left)
{
    const int32_t tiles = (rows_left + EFT_TILE - 1) / EFT_TILE;
    return (rows_left + tiles - 1) / tiles;
}

/**
 * Part of a panel from rows of int8 whose elements are paired: b[(first + k / 2)][column][k % 2] = rows[column][k].
 *
 * @param[in] step   From one row to the next
 * @param[in] count  Elements of a row; an odd one is paired with 0
 */
static inline void eft_pack_rows(const int8_t *rows, ptrdiff_t step, int32_t columns, int32_t count, int32_t first, int16_t *b)
{
    const int32_t lanes = eft_panel_lanes(columns);
    for (int32_t group = 0; group < lanes; group += 8) {
        int16_t *to = b + ((ptrdiff_t)first * lanes + group) * 2;
        for (int32_t k = 0; k < count; k += 16) {
            const int32_t pairs = (eft_least(16, count - k) + 1) / 2;
            __m128i r[8], s[8], t[8];
            for (int32_t column = 0; column < 8; column++) {
                const int32_t some = group + column < columns ? count - k : 0;
                r[column] = eft_some_bytes(some > 0 ? rows + (group + column) * step + k : rows, some);
            }
            for (int32_t i = 0; i < 4; i++) {
                s[2 * i] = _mm_unpacklo_epi16(r[2 * i], r[2 * i + 1]);
                s[2 * i + 1] = _mm_unpackhi_epi16(r[2 * i], r[2 * i + 1]);
            }
            for (int32_t i = 0; i < 2; i++) {
                t[4 * i] = _mm_unpacklo_epi32(s[4 * i], s[4 * i + 2]);
                t[4 * i + 1] = _mm_unpackhi_epi32(s[4 * i], s[4 * i + 2]);
                t[4 * i + 2] = _mm_unpacklo_epi32(s[4 * i + 1], s[4 * i + 3]);
                t[4 * i + 3] = _mm_unpackhi_epi32(s[4 * i + 1], s[4 * i + 3]);
            }
            for (int32_t i = 0; i < 4; i++) {
                r[2 * i] = _mm_unpacklo_epi64(t[i], t[4 + i]);
                r[2 * i + 1] = _mm_unpackhi_epi64(t[i], t[4 + i]);
            }
            for (int32_t pair = 0; pair < pairs; pair++) {
                eft_store256(to, _mm256_cvtepi8_epi16(r[pair]));
                to += 2 * lanes;
            }
        }
    }
}

/** One pair of a panel from two rows of int8, less what minus has: b[column][0] = x[column], b[column][1] = z[column]. */
static inline void eft_pack_pair(__m128i x, __m128i z, __m256i minus, int32_t columns, int16_t *b)
{
    eft_store256(b, _mm256_sub_epi16(_mm256_cvtepi8_epi16(_mm_unpacklo_epi8(x, z)), minus));
    if (columns > 8) {
        eft_store256(b + 16, _mm256_sub_epi16(_mm256_cvtepi8_epi16(_mm_unpackhi_epi8(x, z)), minus));
    }
}

#endif

#endif

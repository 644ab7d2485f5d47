#include "efc.h"

#define STRIP 1024 /* codes unpacked at a time; a multiple of 8, so that each strip begins with a whole byte */

/* The codes [first, first + count) of a block share a scale. */
static inline uint32_t largest_of(const uint8_t *codes, int64_t count, const float *table, float scale)
{
    uint32_t largest = 0;
    for (int64_t i = 0; i < count; i++) {
        const uint32_t magnitude = efc_magnitude(table[codes[i]] * scale);
        largest = magnitude > largest ? magnitude : largest;
    }
    return largest;
}

/* 1 if every product of table and scale is. */
static int32_t all_finite(const float *table, int32_t bits, const float *scales, int64_t n, int64_t block)
{
    uint32_t largest = 0;
    uint32_t largest_scale = 0;
    for (int32_t i = 0; i < 1 << bits; i++) {
        const uint32_t magnitude = efc_magnitude(table[i]);
        largest = magnitude > largest ? magnitude : largest;
    }
    for (int64_t i = 0; i * block < n; i++) {
        const uint32_t magnitude = efc_magnitude(scales[i]);
        largest_scale = magnitude > largest_scale ? magnitude : largest_scale;
    }
    return efc_magnitude(efc_as_float(largest) * efc_as_float(largest_scale)) < EFC_INFINITY;
}

static inline void put(const uint8_t *codes, int64_t count, const float *table, float scale, const float *weight,
                       float *out)
{
    if (weight) {
        const float factor = *weight;
        for (int64_t i = 0; i < count; i++) {
            out[i] += factor * (table[codes[i]] * scale);
        }
    } else {
        for (int64_t i = 0; i < count; i++) {
            out[i] = table[codes[i]] * scale;
        }
    }
}

int32_t efc_lookup_f32(const uint8_t *restrict packed, int64_t n, int32_t bits, const float *restrict table,
                       const float *restrict scales, int64_t block, const float *weight, float *restrict out)
{
    uint8_t strip[STRIP];
    /* The first turn only looks, so that nothing is added of what is malformed. Most often no code can be. */
    for (int32_t turn = all_finite(table, bits, scales, n, block); turn < 2; turn++) {
        for (int64_t first = 0; first < n; first += STRIP) {
            const int64_t end = n - first < STRIP ? n : first + STRIP;
            const uint8_t *codes = packed + first * bits / 8;
            if (bits < 8) {
                efc_unpack_u8(codes, end - first, bits, strip);
                codes = strip;
            }
            for (int64_t begin = first; begin < end;) {
                const int64_t next = (begin / block + 1) * block;
                const int64_t count = (next < end ? next : end) - begin;
                const float scale = scales[begin / block];
                if (turn) {
                    put(codes + (begin - first), count, table, scale, weight, out + begin);
                } else if (largest_of(codes + (begin - first), count, table, scale) >= EFC_INFINITY) {
                    return EFC_MALFORMED;
                }
                begin += count;
            }
        }
    }
    return EFC_OK;
}

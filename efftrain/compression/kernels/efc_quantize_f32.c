#include "efc.h"

/* 1.5 * 2^23: adding it rounds |x| < 2^22 to an integer, half to even, which then stands in the lowest bits. */
#define ROUND 12582912.0f
#define ROUND_BITS 0x4b400000

static inline int32_t round_half_even(float x)
{
    const float shifted = x + ROUND;
    int32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    return bits - ROUND_BITS;
}

int32_t efc_quantize_f32(const float *restrict a, const float *restrict b, int64_t n, int64_t block, int32_t levels,
                         float largest_scale, uint8_t *restrict scales, int8_t *restrict q, float *restrict left)
{
    const float top = (float)levels;
    for (int64_t first = 0; first < n; first += block) {
        const int64_t count = n - first < block ? n - first : block;
        const float *x = a + first;
        float *rest = left ? left + first : NULL;
        int8_t *out = q + first;
        if (b) {
            for (int64_t i = 0; i < count; i++) {
                rest[i] = x[i] + b[first + i];
            }
            x = rest;
        }
        const uint32_t largest = efc_largest_magnitude(x, count);
        if (largest >= EFC_INFINITY) {
            return EFC_NON_FINITE;
        }
        float scale;
        memcpy(&scale, &largest, sizeof scale);
        scale /= top;
        scale = scale > largest_scale ? largest_scale : scale;
        memcpy(scales, &scale, sizeof scale);
        scales += sizeof scale;
        if (scale == 0.0f) {
            for (int64_t i = 0; i < count; i++) {
                out[i] = 0;
                if (rest) {
                    rest[i] = x[i];
                }
            }
            continue;
        }
        for (int64_t i = 0; i < count; i++) {
            float ratio = x[i] / scale;
            ratio = ratio > top ? top : ratio;
            ratio = ratio < -top ? -top : ratio;
            const int32_t level = round_half_even(ratio);
            out[i] = (int8_t)level;
        }
        if (rest) {
            for (int64_t i = 0; i < count; i++) {
                rest[i] = x[i] - (float)out[i] * scale;
            }
        }
    }
    return EFC_OK;
}

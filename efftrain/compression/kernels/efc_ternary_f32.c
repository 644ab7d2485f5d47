#include "efc.h"

int32_t efc_ternary_f32(const float *restrict a, const float *restrict b, const float *restrict noise, int64_t n,
                        int64_t block, float *restrict scales, uint8_t *restrict digits, float *restrict left)
{
    for (int64_t first = 0; first < n; first += block) {
        const int64_t count = n - first < block ? n - first : block;
        const float *x = a + first;
        float *rest = left ? left + first : NULL;
        uint8_t *out = digits + first;
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
        const float scale = efc_as_float(largest);
        *scales++ = scale;
        /* A block of zeros: nothing is below the noise, which is at least 0. */
        const float divisor = largest > 0 ? scale : 1.0f;
        for (int64_t i = 0; i < count; i++) {
            const uint8_t sign = x[i] < 0.0f ? 2 : 1;
            out[i] = noise[first + i] < efc_abs(x[i] / divisor) ? sign : 0;
        }
        if (rest) {
            for (int64_t i = 0; i < count; i++) {
                const float sent = out[i] == 2 ? -scale : scale;
                rest[i] = x[i] - (out[i] ? sent : 0.0f);
            }
        }
    }
    return EFC_OK;
}

#include "efc.h"

#define LANES 16

static inline float mean_magnitude(const float *x, int64_t n)
{
    double sums[LANES] = {0.0};
    const int64_t whole = n - n % LANES;
    for (int64_t i = 0; i < whole; i += LANES) {
        for (int64_t j = 0; j < LANES; j++) {
            sums[j] += (double)efc_abs(x[i + j]);
        }
    }
    for (int64_t j = 0; j < n - whole; j++) {
        sums[j] += (double)efc_abs(x[whole + j]);
    }
    for (int64_t width = LANES / 2; width > 0; width /= 2) {
        for (int64_t j = 0; j < width; j++) {
            sums[j] += sums[width + j];
        }
    }
    return (float)(sums[0] / (double)n);
}

static inline uint8_t eight_signs(const float *x)
{
    uint32_t byte = 0;
    for (uint32_t j = 0; j < 8; j++) {
        byte |= (uint32_t)(x[j] < 0.0f) << j;
    }
    return (uint8_t)byte;
}

int32_t efc_sign_encode_f32(const float *restrict a, const float *restrict b, int64_t n, int64_t block,
                            float *restrict scales, uint8_t *restrict packed, float *restrict left)
{
    for (int64_t first = 0; first < n; first += block) {
        const int64_t count = n - first < block ? n - first : block;
        const float *x = a + first;
        float *rest = left ? left + first : NULL;
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
        const float scale = mean_magnitude(x, count);
        *scales++ = scale;
        int64_t done = 0;
        if (first % 8 == 0) {
            for (; done + 8 <= count; done += 8) {
                packed[(first + done) / 8] = eight_signs(x + done);
            }
        }
        for (; done < count; done++) {
            packed[(first + done) / 8] |= (uint8_t)((uint32_t)(x[done] < 0.0f) << ((first + done) % 8));
        }
        if (rest) {
            for (int64_t i = 0; i < count; i++) {
                rest[i] = x[i] - (x[i] < 0.0f ? -scale : scale);
            }
        }
    }
    return EFC_OK;
}

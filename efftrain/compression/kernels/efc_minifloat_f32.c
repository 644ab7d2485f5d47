#include "efc.h"

/* 1.5 * 2^23: adding it rounds |x| < 2^22 to an integer, half to even, which then stands in the lowest bits. */
#define ROUND 12582912.0f
#define ROUND_BITS 0x4b400000

static inline uint32_t to_bits(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

int32_t efc_minifloat_f32(const float *restrict a, const float *restrict b, int64_t n, int64_t block,
                          efc_minifloat format, float *restrict scales, uint8_t *restrict codes, float *restrict left)
{
    for (int64_t first = 0; first < n; first += block) {
        const int64_t count = n - first < block ? n - first : block;
        const float *x = a + first;
        float *rest = left ? left + first : NULL;
        uint8_t *out = codes + first;
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
        float inverse = 0.0f; /* of a scale that is a power of two */
        if (format.largest_scale > 0.0f) {
            scale = efc_as_float(largest) / format.largest;
            scale = scale > format.largest_scale ? format.largest_scale : scale;
        } else {
            int32_t exponent = (int32_t)(largest >> 23) - 127 - format.largest_exponent;
            exponent = exponent < -127 ? -127 : exponent;
            /* 2^-127 is the one power here that is denormal. */
            scale = exponent == -127 ? efc_as_float(0x00400000u) : efc_as_float((uint32_t)(exponent + 127) << 23);
            inverse = exponent == 127 ? efc_as_float(0x00400000u) : efc_as_float((uint32_t)(127 - exponent) << 23);
        }
        *scales++ = scale;
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
            const float ratio = inverse > 0.0f ? x[i] * inverse : x[i] / scale;
            const uint32_t sign = to_bits(ratio) >> 31;
            float magnitude = efc_abs(ratio);
            magnitude = magnitude > format.largest ? format.largest : magnitude;
            int32_t exponent = (int32_t)(to_bits(magnitude) >> 23) - 127;
            exponent = exponent < format.least_exponent ? format.least_exponent : exponent;
            /* Powers of two, put together from their bits: the product is exact. */
            const float factor = efc_as_float((uint32_t)(127 + format.mantissa_bits - exponent) << 23);
            const int32_t steps = (int32_t)to_bits(magnitude * factor + ROUND) - ROUND_BITS;
            const float step = efc_as_float((uint32_t)(127 - format.mantissa_bits + exponent) << 23);
            float value;
            /* A mantissa that is rounded up to the next power of two carries into the exponent by itself. */
            const uint32_t code = (uint32_t)(((exponent - format.least_exponent) << format.mantissa_bits) + steps);
            if (format.twos_complement) {
                out[i] = (uint8_t)(sign ? 0u - code : code);
                value = (float)(sign ? -steps : steps) * step;
            } else {
                out[i] = (uint8_t)(code | sign << (format.bits - 1));
                value = efc_as_float(to_bits((float)steps * step) | sign << 31);
            }
            if (rest) {
                rest[i] = x[i] - value * scale;
            }
        }
    }
    return EFC_OK;
}

#include "efc.h"

static inline int32_t encode_strip(const float *x, int64_t n, int32_t bf16, uint8_t *codes)
{
    uint32_t largest = 0;
    for (int64_t i = 0; i < n; i++) {
        const uint32_t magnitude = efc_magnitude(x[i]);
        largest = magnitude > largest ? magnitude : largest;
    }
    if (largest >= EFC_INFINITY) {
        return EFC_NON_FINITE;
    }
    if (bf16) {
        for (int64_t i = 0; i < n; i++) {
            efc_store_u16(codes + 2 * i, efc_to_bf16(x[i]));
        }
    } else {
        for (int64_t i = 0; i < n; i++) {
            efc_store_u16(codes + 2 * i, efc_to_fp16(x[i]));
        }
    }
    return EFC_OK;
}

#define STRIP 1024 /* elements that stay in the first cache */

int32_t efc_half_encode_f32(const float *restrict a, const float *restrict b, int64_t n, int32_t bf16,
                            uint8_t *restrict codes, float *restrict left)
{
    for (int64_t first = 0; first < n; first += STRIP) {
        const int64_t count = n - first < STRIP ? n - first : STRIP;
        const float *x = a + first;
        float *rest = left ? left + first : NULL;
        uint8_t *out = codes + 2 * first;
        if (b) {
            for (int64_t i = 0; i < count; i++) {
                rest[i] = x[i] + b[first + i];
            }
            x = rest;
        }
        if (encode_strip(x, count, bf16, out) != EFC_OK) {
            return EFC_NON_FINITE;
        }
        if (rest && bf16) {
            for (int64_t i = 0; i < count; i++) {
                rest[i] = x[i] - efc_from_bf16(efc_load_u16(out + 2 * i));
            }
        } else if (rest) {
            for (int64_t i = 0; i < count; i++) {
                rest[i] = x[i] - efc_from_fp16(efc_load_u16(out + 2 * i));
            }
        }
    }
    return EFC_OK;
}

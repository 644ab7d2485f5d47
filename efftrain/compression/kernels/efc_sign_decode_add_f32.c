#include "efc.h"

/* term or -term */
static inline float with_sign(float term, uint32_t byte, uint32_t bit)
{
    uint32_t bits;
    memcpy(&bits, &term, sizeof bits);
    bits ^= (byte << (31 - bit)) & 0x80000000u;
    memcpy(&term, &bits, sizeof bits);
    return term;
}

void efc_sign_decode_add_f32(const float *restrict scales, const uint8_t *restrict packed, int64_t n, int64_t block,
                             float weight, float *restrict out)
{
    for (int64_t first = 0; first < n; first += block) {
        const int64_t end = n - first < block ? n : first + block;
        const float term = weight * *scales++;
        int64_t i = first;
        if (first % 8 == 0) {
            for (; i + 8 <= end; i += 8) {
                for (uint32_t j = 0; j < 8; j++) {
                    out[i + j] += with_sign(term, packed[i / 8], j);
                }
            }
        }
        for (; i < end; i++) {
            out[i] += with_sign(term, packed[i / 8], (uint32_t)(i % 8));
        }
    }
}

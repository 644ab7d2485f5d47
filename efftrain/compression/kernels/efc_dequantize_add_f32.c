#include "efc.h"

void efc_dequantize_add_f32(const float *restrict scales, const int8_t *restrict q, int64_t n, int64_t block,
                            float weight, float *restrict out)
{
    for (int64_t first = 0; first < n; first += block) {
        const int64_t end = n - first < block ? n : first + block;
        const float scale = *scales++;
        for (int64_t i = first; i < end; i++) {
            out[i] += weight * ((float)q[i] * scale);
        }
    }
}

#include "efc.h"

int32_t efc_dequantize_f32(const uint8_t *restrict scales, const int8_t *restrict q, int64_t n, int64_t block,
                           int32_t levels, float largest_scale, float *restrict out)
{
    if (efc_check_quantized(scales, q, n, block, levels, largest_scale) != EFC_OK) {
        return EFC_MALFORMED;
    }
    for (int64_t first = 0; first < n; first += block, scales += sizeof(float)) {
        const int64_t end = n - first < block ? n : first + block;
        const float scale = efc_read_f32(scales);
        for (int64_t i = first; i < end; i++) {
            out[i] = (float)q[i] * scale;
        }
    }
    return EFC_OK;
}

#include "efc.h"

int32_t efc_half_decode_add_f32(const uint8_t *restrict codes, int64_t n, int32_t bf16, float weight,
                                float *restrict out)
{
    const uint32_t infinity = bf16 ? 0x7f80u : 0x7c00u;
    uint32_t refused = 0;
    for (int64_t i = 0; i < n; i++) {
        refused |= (uint32_t)((efc_load_u16(codes + 2 * i) & infinity) == infinity);
    }
    if (refused) {
        return EFC_NON_FINITE;
    }
    if (bf16) {
        for (int64_t i = 0; i < n; i++) {
            out[i] += weight * efc_from_bf16(efc_load_u16(codes + 2 * i));
        }
    } else {
        for (int64_t i = 0; i < n; i++) {
            out[i] += weight * efc_from_fp16(efc_load_u16(codes + 2 * i));
        }
    }
    return EFC_OK;
}

#include "efc.h"

int32_t efc_half_decode_f32(const uint8_t *restrict codes, int64_t n, int32_t bf16, float *restrict out)
{
    const uint32_t infinity = bf16 ? 0x7f80u : 0x7c00u;
    uint32_t refused = 0;
    if (bf16) {
        for (int64_t i = 0; i < n; i++) {
            const uint32_t code = efc_load_u16(codes + 2 * i);
            refused |= (uint32_t)((code & infinity) == infinity);
            out[i] = efc_from_bf16(code);
        }
    } else {
        for (int64_t i = 0; i < n; i++) {
            const uint32_t code = efc_load_u16(codes + 2 * i);
            refused |= (uint32_t)((code & infinity) == infinity);
            out[i] = efc_from_fp16(code);
        }
    }
    return refused ? EFC_NON_FINITE : EFC_OK;
}

#include "eft_internal.h"

int32_t eft_multiply_factor_grad_s16(const eft_gradient *g, const int8_t *x, int32_t x_zero_point, int32_t pixels,
                                     int32_t channels, const uint8_t *mask, int16_t *gz, int32_t *exponent, int32_t *scratch)
{
    const int32_t cut = eft_cut(g->bits, pixels);
    uint32_t largest = 0;
    uint32_t seen = 0;
    int32_t shift;
    for (int32_t c = 0; c < channels; c++) {
        scratch[c] = 0;
    }
    for (int32_t p = 0; p < pixels; p++) {
        for (int32_t c = 0; c < channels; c++) {
            scratch[c] += eft_rsh32(g->g[p * channels + c], cut) * (x[p * channels + c] - x_zero_point);
        }
    }
    for (int32_t c = 0; c < channels; c++) {
        largest |= eft_magnitude(scratch[c]);
    }
    shift = eft_bit_length(largest) - 15;
    shift = shift < 0 ? 0 : shift;
    for (int32_t c = 0; c < channels; c++) {
        int64_t value = 0;
        if (eft_passes(mask, c)) {
            value = eft_clamp64(eft_rsh(scratch[c], shift), -32767, 32767);
        }
        gz[c] = (int16_t)value;
        seen |= eft_magnitude((int32_t)value);
    }
    *exponent = g->exponent + cut + shift;
    return eft_bit_length(seen);
}

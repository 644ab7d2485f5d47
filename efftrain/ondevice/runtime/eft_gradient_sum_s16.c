#include "eft_internal.h"

int32_t eft_gradient_sum_s16(const eft_gradient *a, const eft_gradient *b, int32_t multiplier, int32_t shift, int32_t count,
                             const uint8_t *mask, int16_t *g, int32_t *exponent)
{
    const int has_b = b != NULL && b->bits > 0;
    int32_t common = a->exponent;
    if (b != NULL && (a->bits > 0 || has_b)) {
        const int32_t top_a = a->exponent + a->bits;
        const int32_t top_b = has_b ? b->exponent + b->bits + 31 - shift : top_a;
        common = (a->bits > 0 && top_a > top_b ? top_a : top_b) - 14;
    }
    const int32_t shift_a = common - a->exponent;
    const int32_t shift_b = has_b ? common - b->exponent + shift : 0;
    uint32_t seen = 0;
    for (int32_t i = 0; i < count; i++) {
        int64_t value = 0;
        if (eft_passes(mask, i)) {
            value = a->bits > 0 ? eft_rsh(a->g[i], shift_a) : 0;
            value += has_b ? eft_rsh((int64_t)b->g[i] * multiplier, shift_b) : 0;
            value = eft_clamp64(value, -32767, 32767);
        }
        g[i] = (int16_t)value;
        seen |= eft_magnitude((int32_t)value);
    }
    *exponent = common;
    return eft_bit_length(seen);
}

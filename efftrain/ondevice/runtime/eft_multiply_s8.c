#include "eft_internal.h"

void eft_multiply_s8(const int8_t *x, const int8_t *z, const eft_product *product, int8_t *y)
{
    const int32_t channels = product->channels;
    for (int32_t p = 0; p < product->pixels; p++) {
        const int8_t *factor = z + (product->z_pixels == 1 ? 0 : p * channels);
        for (int32_t c = 0; c < channels; c++) {
            const int32_t value = (x[p * channels + c] - product->x_zero_point) * (factor[c] - product->z_zero_point);
            const int64_t scaled = eft_rsh((int64_t)value * product->multiplier, product->shift) + product->zero_point;
            y[p * channels + c] = (int8_t)eft_clamp64(scaled, -128, 127);
        }
    }
}

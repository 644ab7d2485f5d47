#include "eft_avx2_input_grad.h"
#include "eft_conv_input_grad.h"

int32_t eft_conv_input_grad_s16(const int16_t *g, int32_t g_bits, const eft_conv_shape *shape, const eft_weights *weights,
                                const eft_input_grad *constants, const uint8_t *x_mask, int16_t *gx, int32_t *scratch)
{
#if EFT_AVX2
    const int32_t bits = eft_conv_input_grad_avx2(g, g_bits, shape, weights, constants, x_mask, gx);
    if (bits >= 0) {
        return bits;
    }
#endif
    const int32_t in_c = shape->in_c;
    /* Two columns at a time, each with a part of the channels, share the scratch. */
    const int32_t half = in_c >= 8 ? in_c / 8 * 4 : in_c / 2;
    return eft_conv_input_grad(g, eft_operand_shift(constants, g_bits), shape, weights, constants, x_mask, 0, in_c, half, gx,
                               scratch);
}

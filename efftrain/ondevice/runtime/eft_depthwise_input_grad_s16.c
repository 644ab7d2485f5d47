#include "eft_avx2_depthwise_input_grad.h"
#include "eft_depthwise_input_grad.h"

int32_t eft_depthwise_input_grad_s16(const int16_t *g, int32_t g_bits, const eft_conv_shape *shape, const eft_weights *weights,
                                     const eft_input_grad *constants, const uint8_t *x_mask, int16_t *gx, int32_t *scratch)
{
#if EFT_AVX2
    const int32_t bits = eft_depthwise_input_grad_avx2(g, g_bits, shape, weights, constants, x_mask, gx);
    if (bits >= 0) {
        return bits;
    }
#endif
    const int32_t channels = shape->in_c;
    return eft_depthwise_input_grad(g, channels, eft_operand_shift(constants, g_bits), shape, weights, constants, x_mask, 0,
                                    channels, gx, scratch);
}

#include "eft_conv_input_grad.h"

int32_t eft_conv_input_grad_tile_s16(const int16_t *g, int32_t g_bits, const eft_conv_shape *shape, const eft_weights *weights,
                                     const eft_input_grad *constants, const uint8_t *x_mask, const eft_channels *tile,
                                     int16_t *gx, int32_t *scratch)
{
    return eft_conv_input_grad(g, eft_operand_shift(constants, g_bits), shape, weights, constants, x_mask, tile->first,
                               tile->first + tile->count, tile->count, gx, scratch);
}

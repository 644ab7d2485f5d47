/** Gradients with respect to the weights of a depthwise layer. Not part of the contract. */
#ifndef EFT_DEPTHWISE_WEIGHT_SUMS_H
#define EFT_DEPTHWISE_WEIGHT_SUMS_H

#include "eft_seen.h"

/** sums[c] = sum over pixels of gradient * input, for channels [0, count) of a depthwise layer. */
static EFT_OUT_OF_LINE void eft_depthwise_weight_sums(const eft_seen *seen, int32_t x_zero_point, int32_t cut, int32_t count,
                                                      int32_t *sums)
{
    for (int32_t c = 0; c < count; c++) {
        sums[c] = 0;
    }
    for (int32_t y = 0; y < seen->rows; y++) {
        const int16_t *value = seen->g + y * seen->g_row;
        const int8_t *pixel = seen->x + y * seen->x_row;
        for (int32_t column = 0; column < seen->columns; column++) {
            for (int32_t c = 0; c < count; c++) {
                sums[c] += eft_rsh32(value[c], cut) * ((int32_t)pixel[c] - x_zero_point);
            }
            value += seen->g_column;
            pixel += seen->x_column;
        }
    }
}

/** Steps of the first count of trained_c channels, whose gradients are shape->out_c a pixel; their weights are trained_c a tap. */
EFT_SHARED void eft_depthwise_update_master(const int8_t *x, int32_t x_zero_point, const eft_gradient *gradient,
                                            const eft_conv_shape *shape, const eft_factors *rate, const eft_optimizer *optimizer,
                                            int8_t *trained, int8_t *residual, int32_t trained_c, int32_t count, int32_t *scratch)
{
    const int32_t cut = eft_cut(gradient->bits, shape->out_h * shape->out_w);
    int32_t index = 0;
    for (int32_t ky = 0; ky < shape->kernel_h; ky++) {
        for (int32_t kx = 0; kx < shape->kernel_w; kx++) {
            const eft_seen seen = eft_seen_through(x, gradient->g, shape, ky, kx);
            eft_depthwise_weight_sums(&seen, x_zero_point, cut, count, scratch);
            for (int32_t c = 0; c < count; c++) {
                const int32_t shift = rate->shift[c] - (gradient->exponent + cut) - 16 + optimizer->lr_shift;
                const int64_t step =
                    eft_optimized(optimizer, index + c, eft_rsh((int64_t)scratch[c] * rate->multiplier[c], shift));
                eft_move_master(trained + index + c, residual + index + c, step);
            }
            index += trained_c;
        }
    }
}

/** The same without residuals; the first weight is number first_index of the model. */
EFT_SHARED void eft_depthwise_update_stochastic(const int8_t *x, int32_t x_zero_point, const eft_gradient *gradient,
                                                const eft_conv_shape *shape, const eft_factors *rate,
                                                const eft_optimizer *optimizer, uint32_t key, uint32_t first_index,
                                                int8_t *trained, int32_t trained_c, int32_t count, int32_t *scratch)
{
    const int32_t cut = eft_cut(gradient->bits, shape->out_h * shape->out_w);
    int32_t index = 0;
    for (int32_t ky = 0; ky < shape->kernel_h; ky++) {
        for (int32_t kx = 0; kx < shape->kernel_w; kx++) {
            const uint32_t first = first_index + (uint32_t)((ky * shape->kernel_w + kx) * shape->in_c);
            const eft_seen seen = eft_seen_through(x, gradient->g, shape, ky, kx);
            eft_depthwise_weight_sums(&seen, x_zero_point, cut, count, scratch);
            for (int32_t c = 0; c < count; c++) {
                const int32_t shift = rate->shift[c] - (gradient->exponent + cut) - 16 + optimizer->lr_shift;
                const int64_t step =
                    eft_optimized(optimizer, index + c, eft_rsh((int64_t)scratch[c] * rate->multiplier[c], shift));
                eft_move_stochastic(trained + index + c, step, key, first + (uint32_t)c);
            }
            index += trained_c;
        }
    }
}

#endif

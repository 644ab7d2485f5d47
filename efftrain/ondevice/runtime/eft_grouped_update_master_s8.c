#include "eft_conv_weight_sums.h"

void eft_grouped_update_master_s8(const int8_t *x, int32_t x_zero_point, const eft_gradient *gradient, const eft_conv_shape *shape,
                                  int32_t groups, const eft_factors *rate, const eft_optimizer *optimizer, int8_t *trained,
                                  int8_t *residual, int32_t trained_c)
{
    const int32_t cut = eft_cut(gradient->bits, shape->out_h * shape->out_w);
    const int32_t taps = shape->kernel_h * shape->kernel_w;
    const int32_t group_in = shape->in_c / groups;
    const int32_t group_out = shape->out_c / groups;
    for (int32_t tap = 0; tap < taps; tap++) {
        const int32_t ky = tap / shape->kernel_w;
        const eft_seen through = eft_seen_through(x, gradient->g, shape, ky, tap - ky * shape->kernel_w);
        for (int32_t o = 0; o < shape->out_c; o++) {
            eft_seen seen = through;
            seen.x += o / group_out * group_in;
            for (int32_t first = 0; first < trained_c; first += EFT_SUMS) {
                const int32_t count = trained_c - first < EFT_SUMS ? trained_c - first : EFT_SUMS;
                const int32_t index = (o * taps + tap) * trained_c + first;
                int32_t sums[EFT_SUMS];
                eft_conv_weight_sums(&seen, x_zero_point, cut, o, count, sums);
                eft_move_masters(sums, count, rate, o, gradient->exponent + cut, optimizer, index, trained + index, residual + index);
                seen.x += count;
            }
        }
    }
}

#ifndef EFT_STEP_F32_H
#define EFT_STEP_F32_H

#include "eft_f32.h"

/**
 * Eight parameters one step of SGD further, as PyTorch counts it.
 *
 *   velocity = momentum * velocity + gradient;  weight -= rate * velocity
 *
 * @param[in,out] velocity  Read and written only if momentum is not 0
 */
EFT_KERNEL void eft_step_f32(float *weight, float *velocity, eft_v8 gradient, float rate, float momentum)
{
    if (momentum != 0.0F) {
        gradient += momentum * eft_load_f32(velocity);
        eft_store_f32(velocity, gradient);
    }
    eft_store_f32(weight, eft_load_f32(weight) - rate * gradient);
}

/** `count` parameters whose gradients were summed up, a multiple of 8; the sums are cleared for the next batch. */
EFT_KERNEL void eft_steps_f32(float *weight, float *velocity, float *gradient, int32_t count, float rate,
                              float momentum)
{
    const eft_v8 zero = {0};
    for (int32_t i = 0; i < count; i += EFT_LANES) {
        eft_step_f32(weight + i, velocity + i, eft_load_f32(gradient + i), rate, momentum);
        eft_store_f32(gradient + i, zero);
    }
}

#endif

/**
 * What the fp32 host kernels share: eight floats at a time, and how a kernel becomes part of its caller.
 *
 * This is the host profile: it simulates thousands of clients and runs on no board. Every kernel is inlined into a call
 * whose sizes are numbers, so that the compiler unrolls its inner loops and keeps its sums in registers. Vectors are the
 * compiler's own (GCC, clang and zig have them on every machine), so there is no intrinsic and no second version.
 *
 * Maps lie row by row, channel last, inside a border of zeros that is as wide as the padding of the layer that reads
 * them. Channels of inner maps are filled up with zeros to whole vectors; those of the network's input are not.
 */
#ifndef EFT_F32_H
#define EFT_F32_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#define EFT_LANES 8

typedef float eft_v8 __attribute__((vector_size(32)));
typedef int32_t eft_i8 __attribute__((vector_size(32)));
typedef float eft_v16 __attribute__((vector_size(64)));

#define EFT_KERNEL static inline __attribute__((always_inline))

#if defined(__clang__)
#define EFT_UNROLL _Pragma("clang loop unroll(full)")
#else
#define EFT_UNROLL _Pragma("GCC unroll 64")
#endif

/** Sums that fit the registers beside what is added to them. */
#if defined(__AVX512VL__)
#define EFT_SUMS 25
#else
#define EFT_SUMS 12
#endif

/** Whether one register holds two vectors; a pair gives the bits of its halves. */
#if defined(__AVX512F__)
#define EFT_PAIRS 1
#else
#define EFT_PAIRS 0
#endif

/** Eight floats from anywhere. Callers may read past what they need: every buffer ends in room for one vector. */
EFT_KERNEL eft_v8 eft_load_f32(const float *from)
{
    eft_v8 value;
    memcpy(&value, from, sizeof value);
    return value;
}

EFT_KERNEL void eft_store_f32(float *to, eft_v8 value)
{
    memcpy(to, &value, sizeof value);
}

EFT_KERNEL eft_v16 eft_load_pair_f32(const float *from)
{
    eft_v16 value;
    memcpy(&value, from, sizeof value);
    return value;
}

EFT_KERNEL void eft_store_pair_f32(float *to, eft_v16 value)
{
    memcpy(to, &value, sizeof value);
}

/** when ? yes : no, lane by lane; a lane of when is all ones or all zeros. */
EFT_KERNEL eft_v8 eft_select_f32(eft_i8 when, eft_v8 yes, eft_v8 no)
{
    return (eft_v8)((when & (eft_i8)yes) | (~when & (eft_i8)no));
}

/** Clamp to [0, high]; NaN stays NaN, so that a training that diverges is seen. */
EFT_KERNEL eft_v8 eft_clamp_f32(eft_v8 value, float high)
{
    const eft_v8 zero = {0};
    const eft_v8 top = zero + high;
    value = (eft_v8)(~(value <= zero) & (eft_i8)value);
    return eft_select_f32(value > top, top, value);
}

/** g where the output y of a clamp to [0, high] lay inside, else 0. */
EFT_KERNEL eft_v8 eft_clamp_grad_f32(eft_v8 y, eft_v8 g, float high)
{
    const eft_v8 zero = {0};
    const eft_v8 top = zero + high;
    return (eft_v8)((y > zero) & (y < top) & (eft_i8)g);
}

/** The eight lanes added pairwise, always in the same order. */
EFT_KERNEL float eft_sum_f32(eft_v8 value)
{
    float lane[EFT_LANES];
    memcpy(lane, &value, sizeof value);
    return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
}

#endif

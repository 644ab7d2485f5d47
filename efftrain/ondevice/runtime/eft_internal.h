/** Arithmetic that the kernels share. See docs/formats/arithmetic.md, "Notation". Not part of the contract. */
#ifndef EFT_INTERNAL_H
#define EFT_INTERNAL_H

#include <stddef.h>

#include "eft.h"

/* Shifting a negative value right must repeat the sign bit; every compiler we build with does, and a build with one
 * that does not stops here. */
typedef char eft_needs_arithmetic_right_shift[((-1) >> 1 == -1) ? 1 : -1];

/** For helpers of a loop that needs all registers: their own would be spilled in it. */
#if defined(__GNUC__)
#define EFT_OUT_OF_LINE __attribute__((noinline))
/** For a body that two kernels share: a frame of its own would cost stack. */
#define EFT_SHARED static inline __attribute__((always_inline))
#else
#define EFT_OUT_OF_LINE
#define EFT_SHARED static inline
#endif

static inline int32_t eft_clamp(int32_t value, int32_t low, int32_t high)
{
    return value < low ? low : (value > high ? high : value);
}

static inline int64_t eft_clamp64(int64_t value, int64_t low, int64_t high)
{
    return value < low ? low : (value > high ? high : value);
}

/** value * 2^-shift, rounded half up; |value| < 2^62 for a right shift. A left shift saturates beyond 2^38 * 2^24. */
static inline int64_t eft_rsh(int64_t value, int32_t shift)
{
    int64_t result;
    if (shift > 62) {
        result = 0;
    } else if (shift > 0) {
        result = (value + ((int64_t)1 << (shift - 1))) >> shift;
    } else {
        const int64_t limit = (int64_t)1 << 38;
        result = eft_clamp64(value, -limit, limit) * ((int64_t)1 << (shift < -24 ? 24 : -shift));
    }
    return result;
}

/** The same for shifts in [0, 30] of values that leave room for the rounding term. */
static inline int32_t eft_rsh32(int32_t value, int32_t shift)
{
    return shift > 0 ? (value + (int32_t)(1U << (uint32_t)(shift - 1))) >> shift : value;
}

/** Number of bits of value; 0 for 0. */
static inline int32_t eft_bit_length(uint32_t value)
{
    int32_t length = 0;
    while (value != 0U) {
        length++;
        value >>= 1;
    }
    return length;
}

/** Smallest k with 2^k >= value, for value >= 1. */
static inline int32_t eft_ceil_log2(int32_t value)
{
    return eft_bit_length((uint32_t)value - 1U);
}

static inline uint32_t eft_magnitude(int32_t value)
{
    return value < 0 ? 0U - (uint32_t)value : (uint32_t)value;
}

static inline uint32_t eft_hash32(uint32_t x)
{
    x ^= x >> 16;
    x *= 0x7feb352dU;
    x ^= x >> 15;
    x *= 0x846ca68bU;
    x ^= x >> 16;
    return x;
}

static inline int eft_passes(const uint8_t *mask, int32_t index)
{
    return mask == NULL || ((mask[index >> 3] >> (index & 7)) & 1) != 0;
}

/** How far a gradient is shifted right before it is summed over pixels, so that no sum leaves int32. */
static inline int32_t eft_cut(int32_t bits, int32_t pixels)
{
    const int32_t excess = bits - (23 - eft_ceil_log2(pixels));
    return excess > 0 ? excess : 0;
}

/** Row of the input, where it lies in a ring. */
static inline const int8_t *eft_row(const int8_t *x, const eft_conv_shape *s, int32_t ring, int32_t row)
{
    return x + (row % ring) * s->in_w * s->in_c;
}

/**
 * Of the output rows (or columns) whose windows hold one input row: the first, ceil((row - kernel + 1) / stride), and the one
 * after the last. row counts from the first row of the padding.
 */
static inline int32_t eft_first_output(int32_t row, int32_t kernel, int32_t stride)
{
    return row < kernel ? 0 : (row - kernel) / stride + 1;
}

static inline int32_t eft_end_output(int32_t row, int32_t stride, int32_t outputs)
{
    const int32_t end = row / stride + 1;
    return end < outputs ? end : outputs;
}

/** Set up to 8 bits of a mask from bit index on; the other bits stay. */
static inline void eft_set_bits(uint8_t *mask, int32_t index, int32_t count, uint32_t bits)
{
    uint8_t *const at = mask + (index >> 3);
    if ((index & 7) == 0 && count == 8) {
        at[0] = (uint8_t)bits;
        return;
    }
    /* They may reach into a second byte, which is not there if they do not. */
    const uint32_t place = (uint32_t)(index & 7);
    const uint32_t changed = ((1U << (uint32_t)count) - 1U) << place;
    at[0] = (uint8_t)((at[0] & ~changed) | (bits << place));
    if (changed > 255U) {
        at[1] = (uint8_t)((at[1] & ~(changed >> 8)) | (bits << place >> 8));
    }
}

/** What a parameter moves: the step itself, or what the optimizer makes of it and of those before. */
static inline int64_t eft_optimized(const eft_optimizer *optimizer, int32_t index, int64_t step)
{
    const int64_t limit = (int64_t)1 << 30;
    int64_t kept;
    if (optimizer->kept == NULL) {
        return step;
    }
    kept = optimizer->kept[index];
    if (optimizer->decay > 0) {
        kept = (kept * optimizer->decay + 16384) >> 15;
    }
    kept = eft_clamp64(kept + eft_clamp64(eft_rsh(step, optimizer->drop), -limit, limit), -limit, limit);
    if (optimizer->decay > 0) {
        optimizer->kept[index] = (int32_t)kept;
        return kept * ((int64_t)1 << optimizer->drop);
    }
    optimizer->kept[index] = optimizer->last != 0 ? 0 : (int32_t)kept;
    return optimizer->last != 0 ? eft_rsh(kept * ((int64_t)1 << optimizer->drop), optimizer->batch_shift) : 0;
}

/** log2 of what a move of a bias counts in; shift is that of the factor from sums to activations. */
static inline int32_t eft_bias_unit(int32_t shift)
{
    return eft_clamp(shift - 39, 0, 15);
}

/** A step of a master weight 256 * trained + residual. */
static inline void eft_move_master(int8_t *trained, int8_t *residual, int64_t step)
{
    const int64_t old = (int64_t)*trained * 256 + *residual;
    /* The ends leave room for a residual in [-128, 127] beside a weight in [-127, 127]. */
    const int32_t master = (int32_t)eft_clamp64(old - ((step + 128) >> 8), -32640, 32639);
    const int32_t weight = (master + 128) >> 8;
    *trained = (int8_t)weight;
    *residual = (int8_t)(master - weight * 256);
}

/** A step of an int8 weight, rounded up as often as its fraction says. */
static inline void eft_move_stochastic(int8_t *trained, int64_t step, uint32_t key, uint32_t index)
{
    const int64_t dither = (int64_t)(eft_hash32(key ^ index) >> 16);
    *trained = (int8_t)eft_clamp64((int64_t)*trained - ((step + dither) >> 16), -127, 127);
}

#endif

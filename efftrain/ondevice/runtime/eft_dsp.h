/**
 * Instructions of processors with the DSP extension (Cortex-M4, M7, M33, ...) that C has no words for: two products of int16 at a
 * time. Sums of int32 are exact, so a kernel gives the same bits with them and without. Not part of the contract.
 */
#ifndef EFT_DSP_H
#define EFT_DSP_H

#include "eft_internal.h"

#if defined(__ARM_FEATURE_DSP) && __ARM_FEATURE_DSP == 1 && !defined(__ARM_BIG_ENDIAN)
#define EFT_DSP 1
#else
#define EFT_DSP 0
#endif

#if EFT_DSP

/** A word of what is otherwise int16. */
typedef uint32_t __attribute__((__may_alias__)) eft_pair;

/** Four int8 at any address. */
static inline uint32_t eft_load4(const int8_t *at)
{
    uint32_t word;
    __builtin_memcpy(&word, at, 4);
    return word;
}

/** Two int16 at any address. */
static inline uint32_t eft_load2(const int16_t *at)
{
    uint32_t word;
    __builtin_memcpy(&word, at, 4);
    return word;
}

/** Bytes 0 and 2 as two int16, each with an int16 of plus added. */
static inline uint32_t eft_even(uint32_t word, uint32_t plus)
{
    uint32_t result;
    __asm("sxtab16 %0, %1, %2" : "=r"(result) : "r"(plus), "r"(word));
    return result;
}

/** Bytes 1 and 3 as two int16, each with an int16 of plus added. */
static inline uint32_t eft_odd(uint32_t word, uint32_t plus)
{
    uint32_t result;
    __asm("sxtab16 %0, %1, %2, ror #8" : "=r"(result) : "r"(plus), "r"(word));
    return result;
}

/** Bytes 0 and 2 as two int16. */
static inline uint32_t eft_even0(uint32_t word)
{
    uint32_t result;
    __asm("sxtb16 %0, %1" : "=r"(result) : "r"(word));
    return result;
}

/** Bytes 1 and 3 as two int16. */
static inline uint32_t eft_odd0(uint32_t word)
{
    uint32_t result;
    __asm("sxtb16 %0, %1, ror #8" : "=r"(result) : "r"(word));
    return result;
}

/** sum + both products of int16. */
static inline int32_t eft_smlad(uint32_t a, uint32_t b, int32_t sum)
{
    int32_t result;
    __asm("smlad %0, %1, %2, %3" : "=r"(result) : "r"(a), "r"(b), "r"(sum));
    return result;
}

/** sum + product of the lower int16 of each. */
static inline int32_t eft_smlabb(uint32_t a, uint32_t b, int32_t sum)
{
    int32_t result;
    __asm("smlabb %0, %1, %2, %3" : "=r"(result) : "r"(a), "r"(b), "r"(sum));
    return result;
}

/** sum + product of the upper int16 of each. */
static inline int32_t eft_smlatt(uint32_t a, uint32_t b, int32_t sum)
{
    int32_t result;
    __asm("smlatt %0, %1, %2, %3" : "=r"(result) : "r"(a), "r"(b), "r"(sum));
    return result;
}

/** sum + product of the lower int16 of a and the upper of b. */
static inline int32_t eft_smlabt(uint32_t a, uint32_t b, int32_t sum)
{
    int32_t result;
    __asm("smlabt %0, %1, %2, %3" : "=r"(result) : "r"(a), "r"(b), "r"(sum));
    return result;
}

/** sum + product of the upper int16 of a and the lower of b. */
static inline int32_t eft_smlatb(uint32_t a, uint32_t b, int32_t sum)
{
    int32_t result;
    __asm("smlatb %0, %1, %2, %3" : "=r"(result) : "r"(a), "r"(b), "r"(sum));
    return result;
}

/** The lower int16 of a, and above it that of b. */
static inline uint32_t eft_lower(uint32_t a, uint32_t b)
{
    uint32_t result;
    __asm("pkhbt %0, %1, %2, lsl #16" : "=r"(result) : "r"(a), "r"(b));
    return result;
}

/** The upper int16 of a, and above it that of b. */
static inline uint32_t eft_upper(uint32_t a, uint32_t b)
{
    uint32_t result;
    __asm("pkhtb %0, %1, %2, asr #16" : "=r"(result) : "r"(b), "r"(a));
    return result;
}

/** A zero point as eft_even and eft_odd take it away. */
static inline uint32_t eft_minus(int32_t zero_point)
{
    return (uint32_t)-zero_point * 0x10001U;
}

#endif

#endif

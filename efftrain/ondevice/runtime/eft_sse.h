/** Instructions of x86-64 for the host library. A kernel gives the same bits with them and without. Not part of the contract. */
#ifndef EFT_SSE_H
#define EFT_SSE_H

#include "eft_internal.h"

#if defined(__SSE2__)
#define EFT_SSE 1
#include <emmintrin.h>

/** Eight int8 at any address as int16, less what minus has. */
static inline __m128i eft_eight(const int8_t *at, __m128i minus)
{
    const __m128i bytes = _mm_loadl_epi64((const __m128i *)(const void *)at);
    return _mm_sub_epi16(_mm_srai_epi16(_mm_unpacklo_epi8(bytes, bytes), 8), minus);
}

/** rsh(v, cut) of eight int16. */
static inline __m128i eft_rsh_eight(__m128i values, int32_t cut)
{
    if (cut == 0) {
        return values;
    }
    /* ((v >> (n-1)) + 1) >> 1 is an average, which is there for unsigned values. */
    const __m128i middle = _mm_set1_epi16(-32768);
    const __m128i shifted = _mm_sra_epi16(values, _mm_cvtsi32_si128(cut - 1));
    return _mm_xor_si128(_mm_avg_epu16(_mm_xor_si128(shifted, middle), middle), middle);
}

#else
#define EFT_SSE 0
#endif

#endif

/**
 * Instructions of x86-64 processors with AVX2 for the host library. A kernel gives the same bits with them and without. They keep
 * what they prepare on the stack, of which a system with a C library has plenty. Not part of the contract.
 */
#ifndef EFT_AVX2_H
#define EFT_AVX2_H

#include "eft_internal.h"

#if defined(__AVX2__) && __STDC_HOSTED__
#define EFT_AVX2 1
#include <immintrin.h>
#include <string.h>
#else
#define EFT_AVX2 0
#endif

#if EFT_AVX2

/** Channels at a time: two registers of int32. */
#define EFT_LANES 16

/** int16 of all lines of one call. */
#define EFT_LINES 32768

#define EFT_INLINE static inline __attribute__((__always_inline__))

static inline int32_t eft_least(int32_t a, int32_t b)
{
    return a < b ? a : b;
}

static inline __m256i eft_load256(const void *at)
{
    return _mm256_loadu_si256((const __m256i *)at);
}

static inline void eft_store256(void *to, __m256i value)
{
    _mm256_storeu_si256((__m256i *)to, value);
}

/** The first 16 bytes at an address, or zeros behind the first count. */
static inline __m128i eft_some_bytes(const int8_t *at, int32_t count)
{
    uint64_t low = 0, high = 0;
    uint32_t first, last;
    if (count >= 16) {
        return _mm_loadu_si128((const __m128i *)(const void *)at);
    }
    /* The last bytes of some are taken with some of those before them, which are shifted out. */
    if (count >= 8) {
        memcpy(&low, at, 8);
        memcpy(&high, at + count - 8, 8);
        high = count == 8 ? 0 : high >> (uint32_t)(8 * (16 - count));
    } else if (count >= 4) {
        memcpy(&first, at, 4);
        memcpy(&last, at + count - 4, 4);
        low = (uint64_t)last << 32 >> (uint32_t)(8 * (8 - count)) & ~(uint64_t)UINT32_MAX;
        low |= first;
    } else {
        for (int32_t i = 0; i < count; i++) {
            low |= (uint64_t)(uint8_t)at[i] << (uint32_t)(8 * i);
        }
    }
    return _mm_set_epi64x((int64_t)high, (int64_t)low);
}

/** The first 8 int32 at an address, with zeros behind the first count. */
static inline __m256i eft_some_words(const int32_t *at, int32_t count)
{
    int32_t words[8] = {0};
    if (count >= 8) {
        return eft_load256(at);
    }
    for (int32_t i = 0; i < count; i++) {
        words[i] = at[i];
    }
    return eft_load256(words);
}

/** int8 as int16, less a zero point. */
static inline void eft_widen(const int8_t *from, int32_t count, int32_t zero_point, int16_t *to)
{
    const __m256i minus = _mm256_set1_epi16((int16_t)zero_point);
    int32_t i = 0;
    for (; i + 16 <= count; i += 16) {
        const __m128i bytes = _mm_loadu_si128((const __m128i *)(const void *)(from + i));
        eft_store256(to + i, _mm256_sub_epi16(_mm256_cvtepi8_epi16(bytes), minus));
    }
    for (; i < count; i++) {
        to[i] = (int16_t)(from[i] - zero_point);
    }
}

/** Input channels [first, first + count) of one weight row of a place, from both parts. */
static inline __m128i eft_weight_lanes(const eft_weights *weights, int32_t in_c, int32_t row, int32_t first, int32_t count)
{
    const int32_t trained_c = weights->trained_c;
    const int32_t frozen_c = in_c - trained_c;
    int8_t both[EFT_LANES] = {0};
    if (first + count <= trained_c) {
        return eft_some_bytes(weights->trained + (ptrdiff_t)row * trained_c + first, count);
    }
    if (first >= trained_c) {
        return eft_some_bytes(weights->frozen + (ptrdiff_t)row * frozen_c + first - trained_c, count);
    }
    memcpy(both, weights->trained + (ptrdiff_t)row * trained_c + first, (size_t)(trained_c - first));
    memcpy(both + trained_c - first, weights->frozen + (ptrdiff_t)row * frozen_c, (size_t)(first + count - trained_c));
    return _mm_loadu_si128((const __m128i *)(const void *)both);
}

/** int16 of a row of a padded input, as far as windows reach. */
static inline int32_t eft_line_of(const eft_conv_shape *s)
{
    const int32_t here = s->pad_w + s->in_w;
    const int32_t seen = (s->out_w - 1) * s->stride_w + s->kernel_w;
    return (here > seen ? here : seen) * s->in_c;
}

/** Whether each output sees the one pixel that is in its place. */
static inline int eft_in_place(const eft_conv_shape *s)
{
    const int one = s->kernel_h == 1 && s->kernel_w == 1 && s->stride_h == 1 && s->stride_w == 1;
    return one && s->pad_h == 0 && s->pad_w == 0 && s->out_h == s->in_h && s->out_w == s->in_w;
}

/** Row number row of a padded input, in its place of kernel_h lines. */
static inline void eft_load_line(const int8_t *x, const eft_conv_shape *s, int32_t ring, int32_t row, int32_t zero_point,
                                 int32_t line, int16_t *lines)
{
    int16_t *const to = lines + (row % s->kernel_h) * line;
    const int32_t margin = s->pad_w * s->in_c;
    const int32_t iy = row - s->pad_h;
    if (iy < 0 || iy >= s->in_h) {
        memset(to, 0, (size_t)line * 2);
        return;
    }
    memset(to, 0, (size_t)margin * 2);
    eft_widen(eft_row(x, s, ring, iy), s->in_w * s->in_c, zero_point, to + margin);
    memset(to + margin + s->in_w * s->in_c, 0, (size_t)(line - margin - s->in_w * s->in_c) * 2);
}

/** rsh(g * scale, shift) for each of channels that repeat, as int16. */
static inline void eft_scale_gradients(const int16_t *g, int32_t pixels, int32_t channels, const int16_t *scale, int32_t shift,
                                       int16_t *to)
{
    const int32_t half = shift > 0 ? 1 << (shift - 1) : 0;
    const __m256i halves = _mm256_set1_epi32(half);
    const __m128i by = _mm_cvtsi32_si128(shift);
    for (int32_t pixel = 0; pixel < pixels; pixel++) {
        int32_t c = 0;
        for (; c + 16 <= channels; c += 16) {
            const __m256i a = eft_load256(g + c);
            const __m256i b = eft_load256(scale + c);
            const __m256i low = _mm256_mullo_epi16(a, b);
            const __m256i high = _mm256_mulhi_epi16(a, b);
            const __m256i first = _mm256_sra_epi32(_mm256_add_epi32(_mm256_unpacklo_epi16(low, high), halves), by);
            const __m256i second = _mm256_sra_epi32(_mm256_add_epi32(_mm256_unpackhi_epi16(low, high), halves), by);
            eft_store256(to + c, _mm256_packs_epi32(first, second));
        }
        for (; c < channels; c++) {
            to[c] = (int16_t)((g[c] * scale[c] + half) >> shift);
        }
        g += channels;
        to += channels;
    }
}

/** rsh(v, cut) of int16. */
static inline __m256i eft_cut_gradients(__m256i values, int32_t cut)
{
    if (cut == 0) {
        return values;
    }
    /* ((v >> (n-1)) + 1) >> 1 is an average, which is there for unsigned values. */
    const __m256i middle = _mm256_set1_epi16(-32768);
    const __m256i shifted = _mm256_sra_epi16(values, _mm_cvtsi32_si128(cut - 1));
    return _mm256_xor_si256(_mm256_avg_epu16(_mm256_xor_si256(shifted, middle), middle), middle);
}

/** The first 16 int16 at an address, with zeros behind the first count. */
static inline __m256i eft_some_gradients(const int16_t *at, int32_t count)
{
    int16_t halves[16] = {0};
    if (count >= 16) {
        return eft_load256(at);
    }
    for (int32_t i = 0; i < count; i++) {
        halves[i] = at[i];
    }
    return eft_load256(halves);
}

/** (value * multiplier) >> 32 of eight int32. */
static inline __m256i eft_upper_product(__m256i value, __m256i multiplier)
{
    const __m256i even = _mm256_mul_epi32(value, multiplier);
    const __m256i odd = _mm256_mul_epi32(_mm256_srli_epi64(value, 32), _mm256_srli_epi64(multiplier, 32));
    return _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
}

/** Sixteen int32 as int16, held to its range. */
static inline __m256i eft_narrow(__m256i first, __m256i second)
{
    return _mm256_permute4x64_epi64(_mm256_packs_epi32(first, second), 0xD8);
}

/** count activations, held to [minimum, 127]; bits of those in [lowest, 127] before. */
static inline uint32_t eft_store_activations(__m256i values, int32_t minimum, int32_t lowest, int32_t count, int8_t *y)
{
    const __m256i above = _mm256_cmpgt_epi16(values, _mm256_set1_epi16((int16_t)(lowest - 1)));
    const __m256i passes = _mm256_andnot_si256(_mm256_cmpgt_epi16(values, _mm256_set1_epi16(127)), above);
    const __m128i flags = _mm_packs_epi16(_mm256_castsi256_si128(passes), _mm256_extracti128_si256(passes, 1));
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(values), _mm256_extracti128_si256(values, 1));
    const __m128i stored = _mm_max_epi8(bytes, _mm_set1_epi8((int8_t)minimum));
    if (count == EFT_LANES) {
        _mm_storeu_si128((__m128i *)(void *)y, stored);
    } else {
        int8_t all[EFT_LANES];
        _mm_storeu_si128((__m128i *)(void *)all, stored);
        memcpy(y, all, (size_t)count);
    }
    return (uint32_t)_mm_movemask_epi8(flags);
}

/** Up to sixteen bits of a mask from bit index on; the other bits stay. */
static inline void eft_set_lanes(uint8_t *mask, int32_t index, int32_t count, uint32_t bits)
{
    for (; count > 0; count -= 8) {
        eft_set_bits(mask, index, eft_least(count, 8), count < 8 ? bits & ((1U << (uint32_t)count) - 1U) : bits & 255U);
        index += 8;
        bits >>= 8;
    }
}

/** The same bits, read. */
static inline uint32_t eft_lanes_that_pass(const uint8_t *mask, int32_t index, int32_t count)
{
    const uint8_t *const at = mask + (index >> 3);
    const int32_t place = index & 7;
    uint32_t bits = at[0];
    if (place + count > 8) {
        bits |= (uint32_t)at[1] << 8;
    }
    if (place + count > 16) {
        bits |= (uint32_t)at[2] << 16;
    }
    return bits >> (uint32_t)place;
}

/** Magnitudes seen, eight or sixteen at a time. */
static inline uint32_t eft_all_bits(__m256i values)
{
    uint32_t words[8];
    uint32_t all = 0;
    eft_store256(words, values);
    for (int32_t i = 0; i < 8; i++) {
        all |= words[i];
    }
    return (all | all >> 16) & 0xFFFFU;
}

#endif

#endif

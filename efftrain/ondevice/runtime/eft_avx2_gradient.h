/** Lines of scaled gradients, and from int32 sums to gradients, with AVX2. Not part of the contract. */
#ifndef EFT_AVX2_GRADIENT_H
#define EFT_AVX2_GRADIENT_H

#include "eft_avx2_elements.h"
#include "eft_gradient.h"

#if EFT_AVX2

/**
 * Scaled gradients of as many rows of the output as one row of the input is seen by, with zeros on all sides: row oy lies in line
 * (oy + lines) % lines, column ox is place ox + before of it.
 */
typedef struct {
    int32_t lines, before, places, line; /**< Lines, places of a line, int16 of a line */
    int32_t next;                        /**< The first row that has not been scaled */
} eft_grad_lines;

static inline eft_grad_lines eft_grad_lines_of(const eft_conv_shape *s)
{
    eft_grad_lines found;
    const int32_t last = (s->in_w - 1 + s->pad_w) / s->stride_w;
    found.lines = (s->kernel_h - 1) / s->stride_h + 1;
    found.before = (s->kernel_w - 1) / s->stride_w;
    found.places = found.before + (last + 1 > s->out_w ? last + 1 : s->out_w);
    found.line = found.places * s->out_c;
    found.next = s->pad_h / s->stride_h - found.lines + 1;
    return found;
}

/** Where row oy, which may be up to lines - 1 above the first, begins. */
static inline int32_t eft_grad_line(const eft_grad_lines *lines, int32_t oy)
{
    return ((oy + lines->lines) % lines->lines) * lines->line;
}

/** Rows up to last. */
static inline void eft_scale_rows(eft_grad_lines *lines, int32_t last, const int16_t *g, const eft_conv_shape *s,
                                  const int16_t *scale, int32_t shift, int16_t *to)
{
    for (; lines->next <= last; lines->next++) {
        int16_t *const line = to + eft_grad_line(lines, lines->next);
        const int32_t margin = lines->before * s->out_c;
        if (lines->next < 0 || lines->next >= s->out_h) {
            memset(line, 0, (size_t)lines->line * 2);
            continue;
        }
        memset(line, 0, (size_t)margin * 2);
        eft_scale_gradients(g + (ptrdiff_t)lines->next * s->out_w * s->out_c, s->out_w, s->out_c, scale, shift, line + margin);
        memset(line + margin + s->out_w * s->out_c, 0, (size_t)(lines->line - margin - s->out_w * s->out_c) * 2);
    }
}

/** eft_store_gradient for up to EFT_LANES elements; the magnitudes are added to seen. */
static inline void eft_store_lanes(const int32_t *sums, int32_t count, int32_t shift, const uint8_t *mask, int32_t index,
                                   int16_t *gx, __m256i *seen)
{
    if (count < EFT_LANES || shift < 1 || shift > 30) {
        const uint32_t some = eft_store_gradient(sums, count, shift, mask, index, gx + index);
        *seen = _mm256_or_si256(*seen, _mm256_set1_epi32((int32_t)some));
        return;
    }
    const __m128i by = _mm_cvtsi32_si128(shift - 1);
    const __m256i one = _mm256_set1_epi32(1);
    const __m256i first = _mm256_srai_epi32(_mm256_add_epi32(_mm256_sra_epi32(eft_load256(sums), by), one), 1);
    const __m256i second = _mm256_srai_epi32(_mm256_add_epi32(_mm256_sra_epi32(eft_load256(sums + 8), by), one), 1);
    __m256i value = _mm256_max_epi16(eft_narrow(first, second), _mm256_set1_epi16(-32767));
    value = eft_masked(value, mask, index);
    eft_store256(gx + index, value);
    *seen = _mm256_or_si256(*seen, _mm256_abs_epi16(value));
}

#endif

#endif

/** Weight gradients and steps of depthwise convolutions with AVX2. Not part of the contract. */
#ifndef EFT_AVX2_DEPTHWISE_UPDATE_H
#define EFT_AVX2_DEPTHWISE_UPDATE_H

#include "eft_avx2_update.h"

#if EFT_AVX2

/** Sums of all places of a kernel. */
#define EFT_TAP_SUMS 16384

/** Gradients of one row by pairs of pixels, as eft_add_row_sums takes them; an odd one is paired with 0. */
static inline void eft_pair_gradients(const int16_t *g, const eft_conv_shape *s, int32_t channels, int32_t cut, int16_t *to)
{
    for (int32_t ox = 0; ox < s->out_w; ox += 2) {
        for (int32_t c = 0; c < channels; c += EFT_LANES) {
            const int16_t *const from = g + ox * s->out_c + c;
            __m256i a = eft_some_gradients(from, channels - c);
            __m256i b = ox + 1 < s->out_w ? eft_some_gradients(from + s->out_c, channels - c) : _mm256_setzero_si256();
            a = eft_cut_gradients(a, cut);
            b = eft_cut_gradients(b, cut);
            eft_store256(to, _mm256_unpacklo_epi16(a, b));
            eft_store256(to + EFT_LANES, _mm256_unpackhi_epi16(a, b));
            to += 2 * EFT_LANES;
        }
    }
}

/** Add what one row gives to the sums of EFT_LANES channels at one place: x and the next are apart, pairs of gradients pair_step. */
static inline void eft_add_row_sums(const int16_t *x, int32_t apart, const int16_t *gradients, int32_t pair_step, int32_t pairs,
                                    int32_t *sums)
{
    __m256i low = eft_load256(sums), high = eft_load256(sums + 8);
    for (; pairs > 0; pairs--) {
        const __m256i a = eft_load256(x);
        const __m256i b = eft_load256(x + apart);
        low = _mm256_add_epi32(low, _mm256_madd_epi16(_mm256_unpacklo_epi16(a, b), eft_load256(gradients)));
        high = _mm256_add_epi32(high, _mm256_madd_epi16(_mm256_unpackhi_epi16(a, b), eft_load256(gradients + EFT_LANES)));
        x += 2 * apart;
        gradients += pair_step;
    }
    eft_store256(sums, low);
    eft_store256(sums + 8, high);
}

/**
 * Weight gradients and steps of a depthwise layer, as far as what is prepared fits.
 *
 * @return 0 if it does not; then nothing was written
 */
static inline int eft_depthwise_update_avx2(const int8_t *x, int32_t x_zero_point, const eft_gradient *gradient,
                                            const eft_conv_shape *shape, const eft_factors *rate, const eft_optimizer *optimizer,
                                            uint32_t key, uint32_t first_index, int8_t *trained, int8_t *residual,
                                            int32_t trained_c)
{
    const eft_conv_shape *s = shape;
    const int32_t taps = s->kernel_h * s->kernel_w;
    const int32_t cut = eft_cut(gradient->bits, s->out_h * s->out_w);
    const eft_moves moves = {rate, optimizer, gradient->exponent + cut, trained, residual, key};
    const int32_t line = eft_line_of(s);
    const int32_t lanes = (trained_c + EFT_LANES - 1) / EFT_LANES * EFT_LANES;
    const int32_t pairs = (s->out_w + 1) / 2;
    /* Behind the last line is room for what an odd pixel is paired with. */
    const int32_t behind = s->stride_w * s->in_c + EFT_LANES;
    int16_t lines[EFT_LINES], gradients[EFT_LINES];
    int32_t sums[EFT_TAP_SUMS];
    if (s->kernel_h * line + behind > EFT_LINES || 2 * pairs * lanes > EFT_LINES || taps * lanes > EFT_TAP_SUMS) {
        return 0;
    }
    memset(sums, 0, (size_t)(taps * lanes) * sizeof sums[0]);
    memset(lines + s->kernel_h * line, 0, (size_t)behind * sizeof lines[0]);
    int32_t loaded = 0; /* Rows of the padded input */
    for (int32_t oy = 0; oy < s->out_h; oy++) {
        const int32_t top = oy * s->stride_h;
        for (loaded = loaded > top ? loaded : top; loaded < top + s->kernel_h; loaded++) {
            eft_load_line(x, s, s->in_h, loaded, x_zero_point, line, lines);
        }
        eft_pair_gradients(gradient->g + (ptrdiff_t)oy * s->out_w * s->out_c, s, trained_c, cut, gradients);
        for (int32_t tap = 0; tap < taps; tap++) {
            const int16_t *const at = lines + ((top + tap / s->kernel_w) % s->kernel_h) * line + tap % s->kernel_w * s->in_c;
            for (int32_t c = 0; c < trained_c; c += EFT_LANES) {
                eft_add_row_sums(at + c, s->stride_w * s->in_c, gradients + 2 * c, 2 * lanes, pairs, sums + tap * lanes + c);
            }
        }
    }
    for (int32_t tap = 0; tap < taps; tap++) {
        for (int32_t c = 0; c < trained_c; c += EFT_LANES) {
            const int32_t count = eft_least(EFT_LANES, trained_c - c);
            const int32_t *const from = sums + tap * lanes + c;
            const __m256i low = eft_load256(from), high = eft_load256(from + 8);
            int32_t ordered[EFT_LANES];
            eft_store256(ordered, _mm256_permute2x128_si256(low, high, 0x20));
            eft_store256(ordered + 8, _mm256_permute2x128_si256(low, high, 0x31));
            eft_move_lanes(&moves, ordered, count, c, 1, tap * trained_c + c, first_index + (uint32_t)(tap * s->in_c + c));
        }
    }
    return 1;
}

#endif

#endif

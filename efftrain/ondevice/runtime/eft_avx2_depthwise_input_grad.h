/** Gradients with respect to the input of a depthwise convolution with AVX2. Not part of the contract. */
#ifndef EFT_AVX2_DEPTHWISE_INPUT_GRAD_H
#define EFT_AVX2_DEPTHWISE_INPUT_GRAD_H

#include "eft_avx2_gradient.h"
#include "eft_avx2_taps.h"

#if EFT_AVX2

/**
 * eft_depthwise_input_grad_s16, as far as what is prepared fits.
 *
 * @return The bits of gx; -1 if it does not fit, and then nothing was written
 */
static inline int32_t eft_depthwise_input_grad_avx2(const int16_t *g, int32_t g_bits, const eft_conv_shape *shape,
                                                    const eft_weights *weights, const eft_input_grad *constants,
                                                    const uint8_t *x_mask, int16_t *gx)
{
    const eft_conv_shape *s = shape;
    const int32_t channels = s->in_c;
    const int32_t shift = 15 - (constants->operand_bits - g_bits);
    const int32_t zeros[EFT_LANES] = {0};
    eft_grad_lines lines = eft_grad_lines_of(s);
    const int32_t per_column = lines.before + 1;
    /* Places of one phase, those of the shortest phases with some that are not there. */
    const int32_t taps = lines.lines * per_column;
    const int32_t pairs = (taps + 1) / 2;
    const int32_t block = 2 * EFT_LANES * pairs;
    const int32_t blocks = (channels + EFT_LANES - 1) / EFT_LANES;
    const int32_t phase = blocks * block;
    int16_t packed[EFT_TAP_WEIGHTS], h[EFT_LINES + EFT_LANES];
    int32_t offsets[EFT_TAPS + 1];
    __m256i seen = _mm256_setzero_si256();
    if (taps > EFT_TAPS || lines.lines * lines.line > EFT_LINES || s->stride_h * s->stride_w * phase > EFT_TAP_WEIGHTS) {
        return -1;
    }
    for (int32_t number = 0; number < s->stride_h * s->stride_w; number++) {
        for (int32_t tap = 0; tap < 2 * pairs; tap += 2) {
            int32_t place[2];
            for (int32_t i = 0; i < 2; i++) {
                const int32_t ky = number / s->stride_w + (tap + i) / per_column * s->stride_h;
                const int32_t kx = number % s->stride_w + (tap + i) % per_column * s->stride_w;
                place[i] = tap + i < taps && ky < s->kernel_h && kx < s->kernel_w ? ky * s->kernel_w + kx : -1;
            }
            for (int32_t c = 0; c < channels; c += EFT_LANES) {
                int16_t *const to = packed + number * phase + c / EFT_LANES * block + tap * EFT_LANES;
                eft_pack_taps(weights, channels, c, place[0], place[1], to);
            }
        }
    }
    memset(h + lines.lines * lines.line, 0, EFT_LANES * sizeof h[0]);
    for (int32_t iy = 0; iy < s->in_h; iy++) {
        const int32_t y = iy + s->pad_h;
        const int32_t last = y / s->stride_h;
        eft_scale_rows(&lines, last, g, s, constants->channel_scale, shift, h);
        for (int32_t tap = 0; tap < 2 * pairs; tap++) {
            const int32_t place = tap < taps ? tap : 0;
            offsets[tap] = eft_grad_line(&lines, last - place / per_column) + (lines.before - place % per_column) * channels;
        }
        for (int32_t c = 0; c < channels; c += EFT_LANES) {
            const int32_t count = eft_least(EFT_LANES, channels - c);
            for (int32_t ix = 0; ix < s->in_w; ix++) {
                const int32_t x = ix + s->pad_w;
                const int32_t number = y % s->stride_h * s->stride_w + x % s->stride_w;
                const int16_t *const w = packed + number * phase + c / EFT_LANES * block;
                int32_t sums[EFT_LANES];
                eft_tap_sums(h + x / s->stride_w * channels + c, offsets, pairs, w, zeros, sums);
                eft_store_lanes(sums, count, constants->shift, x_mask, (iy * s->in_w + ix) * channels + c, gx, &seen);
            }
        }
    }
    return eft_bit_length(eft_all_bits(seen));
}

#endif

#endif

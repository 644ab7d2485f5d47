/** Depthwise convolutions with AVX2. Not part of the contract. */
#ifndef EFT_AVX2_DEPTHWISE_H
#define EFT_AVX2_DEPTHWISE_H

#include "eft_avx2_requantize.h"
#include "eft_avx2_taps.h"

#if EFT_AVX2

/**
 * eft_depthwise_s8, as far as what is prepared fits.
 *
 * @return 0 if it does not; then nothing was written
 */
static inline int eft_depthwise_avx2(const int8_t *x, const eft_conv_shape *shape, int32_t x_zero_point,
                                     const eft_weights *weights, const int32_t *bias, const eft_requantize *out,
                                     const eft_rows *where, int8_t *y, uint8_t *mask)
{
    const eft_conv_shape *s = shape;
    const int32_t channels = s->in_c;
    const int32_t taps = s->kernel_h * s->kernel_w;
    const int32_t pairs = (taps + 1) / 2;
    const int32_t line = eft_line_of(s);
    const int32_t block = 2 * EFT_LANES * pairs;
    int16_t packed[EFT_TAP_WEIGHTS], lines[EFT_LINES + EFT_LANES];
    int32_t offsets[EFT_TAPS + 1];
    if (taps > EFT_TAPS || s->kernel_h * line > EFT_LINES || (channels + EFT_LANES - 1) / EFT_LANES * block > EFT_TAP_WEIGHTS) {
        return 0;
    }
    for (int32_t c = 0; c < channels; c += EFT_LANES) {
        for (int32_t tap = 0; tap < taps; tap += 2) {
            eft_pack_taps(weights, channels, c, tap, tap + 1 < taps ? tap + 1 : -1, packed + c / EFT_LANES * block + tap * EFT_LANES);
        }
    }
    memset(lines + s->kernel_h * line, 0, EFT_LANES * sizeof lines[0]);
    int32_t loaded = where->first * s->stride_h; /* Rows of the padded input */
    for (int32_t oy = where->first; oy < where->first + where->count; oy++) {
        const int32_t top = oy * s->stride_h;
        for (loaded = loaded > top ? loaded : top; loaded < top + s->kernel_h; loaded++) {
            eft_load_line(x, s, where->ring, loaded, x_zero_point, line, lines);
        }
        for (int32_t tap = 0; tap < 2 * pairs; tap++) {
            const int32_t place = tap < taps ? tap : 0;
            offsets[tap] = ((top + place / s->kernel_w) % s->kernel_h) * line + place % s->kernel_w * channels;
        }
        for (int32_t c = 0; c < channels; c += EFT_LANES) {
            const int32_t count = eft_least(EFT_LANES, channels - c);
            const eft_lane_factors factors = eft_factors_of(out, bias, c, count);
            for (int32_t ox = 0; ox < s->out_w; ox++) {
                const int32_t at = ox * channels + c;
                int32_t sums[EFT_LANES];
                eft_tap_sums(lines + ox * s->stride_w * channels + c, offsets, pairs, packed + c / EFT_LANES * block, factors.bias, sums);
                eft_requantize_lanes(sums, &factors, out, count, y + at, mask, oy * s->out_w * channels + at);
            }
        }
        y += s->out_w * channels;
    }
    return 1;
}

#endif

#endif

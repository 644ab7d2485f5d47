#ifndef EFT_CONV_TAPS_F32_H
#define EFT_CONV_TAPS_F32_H

#include "eft_f32.h"

/**
 * The weights of a convolution as eft_conv_row_f32 reads them: output channel last.
 *
 * @param[in]  weight   [outputs][kernel_h][padded]
 * @param[in]  row      Floats of a kernel row that count, at most padded
 * @param[out] taps     [kernel_h][row][channels]; channels beyond outputs are not written
 */
EFT_KERNEL void eft_conv_taps_f32(const float *weight, int32_t outputs, int32_t kernel_h, int32_t row, int32_t padded,
                                  float *taps, int32_t channels)
{
    for (int32_t o = 0; o < outputs; o++) {
        for (int32_t ky = 0; ky < kernel_h; ky++) {
            for (int32_t t = 0; t < row; t++) {
                taps[(ky * row + t) * channels + o] = weight[(o * kernel_h + ky) * padded + t];
            }
        }
    }
}

#endif

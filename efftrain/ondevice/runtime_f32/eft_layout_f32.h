#ifndef EFT_LAYOUT_F32_H
#define EFT_LAYOUT_F32_H

#include "eft_f32.h"

/** Where the kernels keep element (o, c, y, x) of what PyTorch stores as [outputs][channels][height][width]. */
typedef struct {
    int32_t outputs, channels, height, width;
    int32_t next, row, column; /* floats from one o, y and x to the next; c is last */
} eft_layout;

/** From PyTorch's order; elements that it does not have are left alone. */
EFT_KERNEL void eft_from_torch_f32(const float *from, float *to, eft_layout layout)
{
    const int32_t pixels = layout.height * layout.width;
    for (int32_t o = 0; o < layout.outputs; o++) {
        for (int32_t y = 0; y < layout.height; y++) {
            for (int32_t x = 0; x < layout.width; x++) {
                for (int32_t c = 0; c < layout.channels; c++) {
                    to[o * layout.next + y * layout.row + x * layout.column + c] =
                        from[(o * layout.channels + c) * pixels + y * layout.width + x];
                }
            }
        }
    }
}

/** The way back. */
EFT_KERNEL void eft_to_torch_f32(const float *from, float *to, eft_layout layout)
{
    const int32_t pixels = layout.height * layout.width;
    for (int32_t o = 0; o < layout.outputs; o++) {
        for (int32_t c = 0; c < layout.channels; c++) {
            for (int32_t y = 0; y < layout.height; y++) {
                for (int32_t x = 0; x < layout.width; x++) {
                    to[(o * layout.channels + c) * pixels + y * layout.width + x] =
                        from[o * layout.next + y * layout.row + x * layout.column + c];
                }
            }
        }
    }
}

#endif

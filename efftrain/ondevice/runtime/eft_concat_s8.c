#include "eft_internal.h"

void eft_concat_s8(const int8_t *x, int32_t pixels, int32_t channels, int32_t first, int32_t y_channels, int8_t *y)
{
    for (int32_t p = 0; p < pixels; p++) {
        for (int32_t c = 0; c < channels; c++) {
            y[p * y_channels + first + c] = x[p * channels + c];
        }
    }
}

#ifndef EFT_ENTRIES_F32_H
#define EFT_ENTRIES_F32_H

#include "eft_f32.h"

/**
 * What is not zero in the gradient of a convolution's output, channel by channel.
 *
 * After ReLU half of a gradient is zero, after a max pool at least three quarters: the two kernels that read these
 * lists do only what is left. Zeros are not skipped by a jump, which nobody could predict, but overwritten.
 */
typedef struct {
    int32_t *at;    /* [channels][room]: place in x of the output's first tap */
    float *value;   /* [channels][room] */
    int32_t *count; /* [channels] */
    int32_t room;   /* most entries of a channel, and one more */
} eft_entries;

/**
 * Collect the entries of one sample.
 *
 * @param[in]  y          Output of the layer, of its pool if one was fused with it: [rows][columns][channels] in y_row
 * @param[in]  g          Its gradient, laid out as y
 * @param[in]  which      Place of the largest in each window, [rows][columns][channels]; NULL without a pool
 * @param[in]  places     Place in x for each of which, from the first tap of a window
 * @param[in]  outputs    Channels that count, at most channels
 * @param[in]  down       Place in x from one row of y to the next; right: from one column to the next
 * @param[in]  clamped    Whether y was clamped to [0, high]
 */
EFT_KERNEL void eft_collect_entries_f32(const float *y, const float *g, int32_t y_row, int32_t rows, int32_t columns,
                                        int32_t outputs, int32_t channels, const int32_t *which, const int32_t *places,
                                        int32_t down, int32_t right, int32_t clamped, float high, eft_entries entries)
{
    for (int32_t o = 0; o < outputs; o++) {
        entries.count[o] = 0;
    }
    for (int32_t i = 0; i < rows; i++) {
        for (int32_t j = 0; j < columns; j++) {
            const float *value = y + i * y_row + j * channels;
            const float *gradient = g + i * y_row + j * channels;
            for (int32_t o = 0; o < outputs; o++) {
                const int32_t inside = !clamped || (value[o] > 0.0F && value[o] < high);
                const float kept = inside ? gradient[o] : 0.0F;
                const int32_t n = entries.count[o];
                const int32_t window = which ? places[which[(i * columns + j) * channels + o]] : 0;
                entries.at[o * entries.room + n] = i * down + j * right + window;
                entries.value[o * entries.room + n] = kept;
                entries.count[o] = n + (kept != 0.0F);
            }
        }
    }
}

#endif

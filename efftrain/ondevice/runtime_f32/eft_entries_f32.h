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
    for (int32_t first = 0; first < outputs; first += EFT_LANES) {
        int32_t *const at = entries.at + first * entries.room;
        float *const value = entries.value + first * entries.room;
        int32_t n[EFT_LANES] = {0};
        for (int32_t i = 0; i < rows; i++) {
            for (int32_t j = 0; j < columns; j++) {
                const int32_t place = i * y_row + j * channels + first;
                const eft_v8 gradient = eft_load_f32(g + place);
                const eft_v8 kept = clamped ? eft_clamp_grad_f32(eft_load_f32(y + place), gradient, high) : gradient;
                float lane[EFT_LANES];
                eft_store_f32(lane, kept);
                EFT_UNROLL
                for (int32_t k = 0; k < EFT_LANES; k++) {
                    if (first + k < outputs) {
                        const int32_t window = which ? places[which[(i * columns + j) * channels + first + k]] : 0;
                        at[k * entries.room + n[k]] = i * down + j * right + window;
                        value[k * entries.room + n[k]] = lane[k];
                        n[k] += lane[k] != 0.0F;
                    }
                }
            }
        }
        EFT_UNROLL
        for (int32_t k = 0; k < EFT_LANES; k++) {
            if (first + k < outputs) {
                entries.count[first + k] = n[k];
            }
        }
    }
}

#endif

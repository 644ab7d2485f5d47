#ifndef EFT_POOL_F32_H
#define EFT_POOL_F32_H

#include "eft_f32.h"

/** A window that slides over a map: sizes of the map, of the result, of the window and its steps. */
typedef struct {
    int32_t in_h, in_w, x_row; /* x_row: floats from one row of the map to the next */
    int32_t out_h, out_w, y_row;
    int32_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
    int32_t channels; /* a multiple of 8 */
} eft_pool;

/**
 * Largest value of each window. What lies outside of the map does not count; NaN does.
 *
 * @param[in]  x        First element of the map
 * @param[out] y        First element of the result
 * @param[out] which    [out_h][out_w][channels]: place in x of the largest, the first of equals
 */
EFT_KERNEL void eft_max_pool_f32(const float *x, float *y, int32_t *which, eft_pool pool)
{
    for (int32_t i = 0; i < pool.out_h; i++) {
        for (int32_t j = 0; j < pool.out_w; j++) {
            for (int32_t c = 0; c < pool.channels; c++) {
                int32_t best = -1;
                for (int32_t ky = 0; ky < pool.kernel_h; ky++) {
                    for (int32_t kx = 0; kx < pool.kernel_w; kx++) {
                        const int32_t row = i * pool.stride_h + ky - pool.pad_h;
                        const int32_t column = j * pool.stride_w + kx - pool.pad_w;
                        const int32_t place = row * pool.x_row + column * pool.channels + c;
                        if (row >= 0 && row < pool.in_h && column >= 0 && column < pool.in_w &&
                            (best < 0 || !(x[place] <= x[best]))) {
                            best = place;
                        }
                    }
                }
                y[i * pool.y_row + j * pool.channels + c] = x[best];
                which[(i * pool.out_w + j) * pool.channels + c] = best;
            }
        }
    }
}

/** dx[which] += dy; the caller clears dx. */
EFT_KERNEL void eft_max_pool_grad_f32(const float *dy, const int32_t *which, float *dx, eft_pool pool)
{
    for (int32_t i = 0; i < pool.out_h; i++) {
        for (int32_t j = 0; j < pool.out_w; j++) {
            for (int32_t c = 0; c < pool.channels; c++) {
                dx[which[(i * pool.out_w + j) * pool.channels + c]] += dy[i * pool.y_row + j * pool.channels + c];
            }
        }
    }
}

/** Mean of each window; what lies outside of the map counts as zeros. */
EFT_KERNEL void eft_average_pool_f32(const float *x, float *y, eft_pool pool)
{
    const float share = 1.0F / (float)(pool.kernel_h * pool.kernel_w);
    for (int32_t i = 0; i < pool.out_h; i++) {
        for (int32_t j = 0; j < pool.out_w; j++) {
            for (int32_t c = 0; c < pool.channels; c += EFT_LANES) {
                eft_v8 sum = {0};
                for (int32_t ky = 0; ky < pool.kernel_h; ky++) {
                    for (int32_t kx = 0; kx < pool.kernel_w; kx++) {
                        const int32_t row = i * pool.stride_h + ky - pool.pad_h;
                        const int32_t column = j * pool.stride_w + kx - pool.pad_w;
                        if (row >= 0 && row < pool.in_h && column >= 0 && column < pool.in_w) {
                            sum += eft_load_f32(x + row * pool.x_row + column * pool.channels + c);
                        }
                    }
                }
                eft_store_f32(y + i * pool.y_row + j * pool.channels + c, share * sum);
            }
        }
    }
}

/** dx += dy / size of the window, for every element of it; the caller clears dx. */
EFT_KERNEL void eft_average_pool_grad_f32(const float *dy, float *dx, eft_pool pool)
{
    const float share = 1.0F / (float)(pool.kernel_h * pool.kernel_w);
    for (int32_t i = 0; i < pool.out_h; i++) {
        for (int32_t j = 0; j < pool.out_w; j++) {
            for (int32_t c = 0; c < pool.channels; c += EFT_LANES) {
                const eft_v8 g = share * eft_load_f32(dy + i * pool.y_row + j * pool.channels + c);
                for (int32_t ky = 0; ky < pool.kernel_h; ky++) {
                    for (int32_t kx = 0; kx < pool.kernel_w; kx++) {
                        const int32_t row = i * pool.stride_h + ky - pool.pad_h;
                        const int32_t column = j * pool.stride_w + kx - pool.pad_w;
                        if (row >= 0 && row < pool.in_h && column >= 0 && column < pool.in_w) {
                            float *place = dx + row * pool.x_row + column * pool.channels + c;
                            eft_store_f32(place, eft_load_f32(place) + g);
                        }
                    }
                }
            }
        }
    }
}

#endif

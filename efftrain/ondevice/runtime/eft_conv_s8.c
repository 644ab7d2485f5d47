#include "eft_patch.h"
#include "eft_requantize.h"

/** Output channels at a time. */
#define BLOCK 16

/** Inputs [first, first + count) of one or two pixels. */
static EFT_OUT_OF_LINE void gather(eft_patch *patch, int32_t pixels, const eft_patch_source *source, int32_t oy, int32_t ox,
                                   int32_t first, int32_t count)
{
    for (int32_t pixel = 0; pixel < pixels; pixel++) {
        eft_patch_gather(patch, pixel, source, oy, ox + pixel, first, count);
    }
}

/** What the inputs of a patch give to some output channels, each of which has num_weights weights. */
static EFT_OUT_OF_LINE void add_patch(const eft_patch *patch, int32_t count, const int8_t *w, int32_t num_weights,
                                      int32_t channels, const int32_t *bias, int32_t *sums)
{
    for (; channels > 0; channels -= 2) {
        const int8_t *const next = channels > 1 ? w + num_weights : w;
        eft_patch_dot(patch, count, w, next, bias, sums);
        bias = bias != NULL ? bias + 2 : NULL;
        w = next + num_weights;
        sums += 4;
    }
}

void eft_conv_s8(const int8_t *x, const eft_conv_shape *shape, int32_t x_zero_point, const eft_weights *weights,
                 const int32_t *bias, const eft_requantize *out, const eft_rows *rows, int8_t *y, uint8_t *mask)
{
    const int32_t out_c = shape->out_c;
    const int32_t taps = shape->kernel_h * shape->kernel_w;
    const int32_t trained_c = weights->trained_c;
    const int32_t frozen_c = shape->in_c - trained_c;
    const int32_t counts[2] = {taps * trained_c, taps * frozen_c};
    const int32_t only = trained_c == 0 ? 1 : 0;
    const int one_patch = (trained_c == 0 || frozen_c == 0) && counts[only] <= EFT_PATCH;
    const int8_t *const starts[2] = {weights->trained, weights->frozen};
    const eft_patch_source sources[2] = {{x, shape, rows->ring, x_zero_point, 0, trained_c},
                                         {x, shape, rows->ring, x_zero_point, trained_c, frozen_c}};
    int32_t index = rows->first * shape->out_w * out_c;
    eft_patch patch;
    int32_t sums[2 * BLOCK];
    for (int32_t oy = rows->first; oy < rows->first + rows->count; oy++) {
        for (int32_t ox = 0; ox < shape->out_w; ox += 2) {
            const int32_t pixels = shape->out_w - ox < 2 ? 1 : 2;
            if (one_patch) {
                gather(&patch, pixels, &sources[only], oy, ox, 0, counts[only]);
            }
            for (int32_t o = 0; o < out_c; o += BLOCK) {
                const int32_t channels = out_c - o < BLOCK ? out_c - o : BLOCK;
                if (one_patch) {
                    add_patch(&patch, counts[only], starts[only] + o * counts[only], counts[only], channels, bias + o, sums);
                } else {
                    const int32_t *begin = bias + o;
                    for (int32_t part = 0; part < 2; part++) {
                        for (int32_t first = 0; first < counts[part]; first += EFT_PATCH) {
                            const int32_t count = counts[part] - first < EFT_PATCH ? counts[part] - first : EFT_PATCH;
                            const int8_t *const w = starts[part] + o * counts[part] + first;
                            gather(&patch, pixels, &sources[part], oy, ox, first, count);
                            add_patch(&patch, count, w, counts[part], channels, begin, sums);
                            begin = NULL;
                        }
                    }
                }
                eft_requantize_pixels(sums, pixels, channels, out, o, y + o, out_c, mask, index + o);
            }
            y += pixels * out_c;
            index += pixels * out_c;
        }
    }
}

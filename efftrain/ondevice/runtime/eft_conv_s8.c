#include "eft_avx2_conv.h"
#include "eft_patch.h"
#include "eft_requantize.h"

/** Output channels at a time. */
#define BLOCK 24

/** Inputs [first, first + count) of one or two pixels. */
static EFT_OUT_OF_LINE void gather(eft_patch *patch, int32_t pixels, const eft_layer *layer, int32_t part, int32_t oy, int32_t ox,
                                   int32_t first, int32_t count)
{
    for (int32_t pixel = 0; pixel < pixels; pixel++) {
        eft_patch_gather(patch, pixel, layer, part, oy, ox + pixel, first, count);
    }
}

/** What the inputs of a patch give to some output channels, each of which has num_weights weights. */
static EFT_OUT_OF_LINE void add_patch(const eft_patch *patch, int32_t count, const int8_t *w, int32_t num_weights,
                                      int32_t channels, const eft_begin *begin, int32_t *sums)
{
    const int32_t *from = begin->at;
    const int32_t channel = begin->channel;
    const int32_t pixel = begin->pixel;
    int32_t *const end = sums + 2 * (channels & ~1);
    while (sums != end) {
        eft_patch_dot(patch, count, w, w + num_weights, from, channel, pixel, sums);
        w += 2 * num_weights;
        from += 2 * channel;
        sums += 4;
    }
    if ((channels & 1) != 0) {
        /* The other half of the pair is one that nobody reads. */
        eft_patch_dot(patch, count, w, w, from, 0, pixel, sums);
    }
}

void eft_conv_s8(const int8_t *x, const eft_conv_shape *shape, int32_t x_zero_point, const eft_weights *weights,
                 const int32_t *bias, const eft_requantize *out, const eft_rows *rows, int8_t *y, uint8_t *mask)
{
#if EFT_AVX2
    if (eft_conv_avx2(x, shape, x_zero_point, weights, bias, out, rows, y, mask)) {
        return;
    }
#endif
    const eft_layer layer = {x, shape, weights, rows->ring, x_zero_point};
    const int32_t out_c = shape->out_c;
    const int32_t taps = shape->kernel_h * shape->kernel_w;
    int32_t index = rows->first * shape->out_w * out_c;
    eft_patch patch;
    int32_t sums[2 * BLOCK];
    for (int32_t oy = rows->first; oy < rows->first + rows->count; oy++) {
        for (int32_t ox = 0; ox < shape->out_w; ox += 2) {
            const int32_t pixels = shape->out_w - ox < 2 ? 1 : 2;
            int32_t in_patch = -1; /* First input of it, -1 if it must be filled anew */
            for (int32_t o = 0; o < out_c; o += BLOCK) {
                const int32_t channels = out_c - o < BLOCK ? out_c - o : BLOCK;
                eft_begin begin = {bias + o, 1, 0};
                for (int32_t part = 0; part < 2; part++) {
                    const int32_t part_c = eft_part_channels(&layer, part);
                    const int32_t num_weights = taps * part_c;
                    if (part_c == 0) {
                        continue;
                    }
                    const int8_t *w = (part == 0 ? weights->trained : weights->frozen) + o * num_weights;
                    for (int32_t first = 0; first < num_weights; first += EFT_PATCH) {
                        const int32_t count = num_weights - first < EFT_PATCH ? num_weights - first : EFT_PATCH;
                        if (in_patch != first || part_c != shape->in_c) {
                            gather(&patch, pixels, &layer, part, oy, ox, first, count);
                            in_patch = first;
                        }
                        add_patch(&patch, count, w, num_weights, channels, &begin, sums);
                        begin.at = sums;
                        begin.channel = 2;
                        begin.pixel = 1;
                        w += EFT_PATCH;
                    }
                }
                eft_requantize_pixels(sums, pixels, channels, out, o, y, out_c, mask, index);
                y += channels;
                index += channels;
            }
            if (pixels == 2) {
                y += out_c;
                index += out_c;
            }
        }
    }
}

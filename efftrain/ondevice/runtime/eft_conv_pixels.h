/** One or two pixels of a convolution, from sums of a patch. Not part of the contract. */
#ifndef EFT_CONV_PIXELS_H
#define EFT_CONV_PIXELS_H

#include "eft_patch.h"
#include "eft_requantize.h"

/** Output channels at a time. */
#define EFT_BLOCK 24

/** Inputs [first, first + count) of one or two pixels. */
static EFT_OUT_OF_LINE void eft_gather(eft_patch *patch, int32_t pixels, const eft_layer *layer, int32_t part, int32_t oy,
                                       int32_t ox, int32_t first, int32_t count)
{
    for (int32_t pixel = 0; pixel < pixels; pixel++) {
        eft_patch_gather(patch, pixel, layer, part, oy, ox + pixel, first, count);
    }
}

/** What the inputs of a patch give to some output channels, each of which has num_weights weights. */
static EFT_OUT_OF_LINE void eft_add_patch(const eft_patch *patch, int32_t count, const int8_t *w, int32_t num_weights,
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

/**
 * Output channels [begin, end), all of which see the channels that the layer has, of pixels ox and, if pixels is 2, ox + 1.
 *
 * @param[out] y      Of channel 0 of the first pixel
 * @param[in]  index  Element of the whole tensor that y[0] is
 */
EFT_SHARED void eft_conv_pixels(const eft_layer *layer, int32_t oy, int32_t ox, int32_t pixels, int32_t begin_o, int32_t end_o,
                                const int32_t *bias, const eft_requantize *out, int8_t *y, uint8_t *mask, int32_t index)
{
    const int32_t taps = layer->shape->kernel_h * layer->shape->kernel_w;
    int32_t in_patch = -1; /* First input of it, -1 if it must be filled anew */
    eft_patch patch;
    int32_t sums[2 * EFT_BLOCK];
    for (int32_t o = begin_o; o < end_o; o += EFT_BLOCK) {
        const int32_t channels = end_o - o < EFT_BLOCK ? end_o - o : EFT_BLOCK;
        eft_begin begin = {bias + o, 1, 0};
        for (int32_t part = 0; part < 2; part++) {
            const int32_t part_c = eft_part_channels(layer, part);
            const int32_t num_weights = taps * part_c;
            if (part_c == 0) {
                continue;
            }
            const int8_t *w = (part == 0 ? layer->weights->trained : layer->weights->frozen) + o * num_weights;
            for (int32_t first = 0; first < num_weights; first += EFT_PATCH) {
                const int32_t count = num_weights - first < EFT_PATCH ? num_weights - first : EFT_PATCH;
                if (in_patch != first || part_c != layer->channels) {
                    eft_gather(&patch, pixels, layer, part, oy, ox, first, count);
                    in_patch = first;
                }
                eft_add_patch(&patch, count, w, num_weights, channels, &begin, sums);
                begin.at = sums;
                begin.channel = 2;
                begin.pixel = 1;
                w += EFT_PATCH;
            }
        }
        eft_requantize_pixels(sums, pixels, channels, out, o, y + o, layer->shape->out_c, mask, index + o);
    }
}

#endif

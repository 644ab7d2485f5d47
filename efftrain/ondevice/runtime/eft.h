/**
 * The kernels of a device program: training a small CNN with integers only.
 *
 * This header is the contract; docs/formats/arithmetic.md is the specification of every result, to the bit. C99, no heap, no stdio,
 * no global state, no recursion, no floating point. Every buffer comes from the caller. Two of one call may overlap only where a
 * kernel says so.
 *
 * Activations are int8 in [pixels][channels] order (channel last) with a zero point that is -128 or 0: the quantized value is
 * stored - zero_point. Gradients are int16 with |q| < 2^15 and stand for q * 2^exponent * sigma, where sigma
 * is a constant of the compiler and the exponent one int32 a tensor. The bits of a gradient are the bit length of its largest |q|.
 */
#ifndef EFT_H
#define EFT_H

#include <stdint.h>

/** What the functions of a generated model return. Classes and EFT_OK are >= 0, errors are < 0. */
#define EFT_OK 0
#define EFT_ERROR_ARGUMENT (-1) /**< A pointer is NULL or a setting is out of its range */
#define EFT_ERROR_SIZE (-2)     /**< The number of bytes is not what the model takes */
#define EFT_ERROR_LABEL (-3)    /**< The label is not in [0, classes) */
#define EFT_ERROR_STATE (-4)    /**< A trained state holds a value outside the range that rules overflow out */

/** Largest |bias|. With at most 33,155 terms a sum, an int32 accumulator cannot overflow. */
#define EFT_BIAS_LIMIT 1073741824

/**
 * A convolution: dense, in groups, or depthwise with in_c = out_c and one filter a channel. A linear layer is a dense one whose
 * kernel covers its whole input.
 */
typedef struct {
    int32_t in_h, in_w, in_c;
    int32_t out_h, out_w, out_c;
    int32_t kernel_h, kernel_w;
    int32_t stride_h, stride_w;
    int32_t pad_h, pad_w; /**< Rows above and columns to the left; what lies beyond the input, on any side, counts as zero */
} eft_conv_shape;

/**
 * Which rows of the output a call computes, and where the rows of its input are.
 *
 * Rows are computed in ascending order. From the first write to output row r on, no input row before r * stride_h - pad_h is read
 * any more, so row r may overlap such rows and what lies before them, but no other.
 */
typedef struct {
    int32_t first, count; /**< Output rows [first, first + count); y points at row `first`, a mask at row 0 */
    int32_t ring;         /**< Input row r lies at x + (r % ring) * in_w * in_c: in_h if the whole input is there */
} eft_rows;

/**
 * The weights of one layer in two runs: input channels [0, trained_c) live in RAM and learn, the others stay in flash.
 * A depthwise layer has no dimension out_c: [kernel_h][kernel_w][trained_c] and [kernel_h][kernel_w][in_c - trained_c].
 */
typedef struct {
    const int8_t *trained; /**< [out_c][kernel_h][kernel_w][trained_c], in [-127, 127]; not read if trained_c is 0 */
    const int8_t *frozen;  /**< [out_c][kernel_h][kernel_w][in_c - trained_c]; not read if trained_c is in_c */
    int32_t trained_c;
} eft_weights;

/** One factor a channel: multiplier * 2^-shift. */
typedef struct {
    const int32_t *multiplier; /**< 0 or in [2^30, 2^31) */
    const int8_t *shift;       /**< In [-128, 127] */
} eft_factors;

/** How accumulators become activations. */
typedef struct {
    eft_factors factors;  /**< Per output channel; shifts in [1, 62] */
    int32_t zero_point;   /**< -128 or 0 */
    int32_t minimum;      /**< Smallest stored value: zero_point after a ReLU, else -128 */
    int32_t pass_minimum; /**< Smallest value, clamped or not, that passes a gradient: minimum + 1 after a ReLU, else -128 */
} eft_requantize;

/**
 * Convolution with bias, requantization and ReLU.
 *
 *   v       = rsh(bias[o] + sum w[o][k][i] * (x[..][i] - x_zero_point), factor[o]) + zero_point
 *   y[p][o] = clamp(v, minimum, 127);  mask bit = pass_minimum <= v <= 127
 *
 * @param[in]  x             Input, rows of [in_w][in_c]
 * @param[in]  shape         kernel_h * kernel_w * in_c <= 33,155
 * @param[in]  x_zero_point  -128 or 0
 * @param[in]  bias          Per output channel, |bias| <= EFT_BIAS_LIMIT
 * @param[out] y             [rows.count * out_w][out_c]
 * @param[out] mask          One bit an element of the whole output, 1 where a gradient passes; bit i is bit (i & 7) of byte
 *                           (i >> 3). Only the bits of the computed rows change. NULL if no gradient will be asked for
 */
void eft_conv_s8(const int8_t *x, const eft_conv_shape *shape, int32_t x_zero_point, const eft_weights *weights,
                 const int32_t *bias, const eft_requantize *out, const eft_rows *rows, int8_t *y, uint8_t *mask);

/** The same with one filter a channel: sum w[k][c] * (x[..][c] - x_zero_point). in_c = out_c. */
void eft_depthwise_s8(const int8_t *x, const eft_conv_shape *shape, int32_t x_zero_point, const eft_weights *weights,
                      const int32_t *bias, const eft_requantize *out, const eft_rows *rows, int8_t *y, uint8_t *mask);

/**
 * The same in groups: output channels [j * out_c / groups, ...) see input channels [j * in_c / groups, ...). Weights are
 * [out_c][kernel_h][kernel_w][in_c / groups], and trained_c counts the channels of a group; so for all eft_grouped kernels.
 *
 * @param[in] groups  A divisor of in_c and of out_c
 */
void eft_grouped_s8(const int8_t *x, const eft_conv_shape *shape, int32_t groups, int32_t x_zero_point, const eft_weights *weights,
                    const int32_t *bias, const eft_requantize *out, const eft_rows *rows, int8_t *y, uint8_t *mask);

/** Constants of eft_add_s8. */
typedef struct {
    int32_t x_zero_point, x_multiplier; /**< Multipliers in [0, 2^21) */
    int32_t z_zero_point, z_multiplier;
    int32_t shift; /**< In [1, 30] */
    int32_t zero_point, minimum, pass_minimum;
} eft_sum;

/**
 * Sum of two tensors.
 *
 *   v    = rsh((x[i] - x_zero_point) * x_multiplier + (z[i] - z_zero_point) * z_multiplier, shift) + zero_point
 *   y[i] = clamp(v, minimum, 127);  mask bit = pass_minimum <= v <= 127
 *
 * @param[in]  count  Elements
 * @param[out] y      May be x, or z, or lie at a lower address than what it overlaps
 * @param[out] mask   (count + 7) / 8 bytes, or NULL
 */
void eft_add_s8(const int8_t *x, const int8_t *z, const eft_sum *sum, int32_t count, int8_t *y, uint8_t *mask);

/** y[i] = table[x[i] + 128]. y may be x, or lie at a lower address. */
void eft_table_s8(const int8_t *x, const int8_t *table, int32_t count, int8_t *y);

/** Largest of each window; what lies beyond the input is never largest. in_c = out_c; overlap as said at eft_rows. */
void eft_max_pool_s8(const int8_t *x, const eft_conv_shape *shape, const eft_rows *rows, int8_t *y);

/**
 * Product of two tensors: v = rsh((x - x_zero_point) * (z - z_zero_point) * multiplier, shift) + zero_point, clamped to int8.
 *
 * @param[in]  z_pixels   pixels, or 1: then z holds one factor a channel
 * @param[in]  multiplier 0 or in [2^30, 2^31), shift in [1, 62]
 * @param[out] y          May be x, or lie at a lower address
 */
typedef struct {
    int32_t pixels, channels, z_pixels;
    int32_t x_zero_point, z_zero_point;
    int32_t multiplier, shift, zero_point;
} eft_product;
void eft_multiply_s8(const int8_t *x, const int8_t *z, const eft_product *product, int8_t *y);

/** Channels of one tensor into channels [first, first + channels) of another: y[p][first + c] = x[p][c]. */
void eft_concat_s8(const int8_t *x, int32_t pixels, int32_t channels, int32_t first, int32_t y_channels, int8_t *y);

/**
 * The last layer: the same sums as eft_conv_s8, scaled to logits in units of ln(2) / 256 and clamped to int16.
 *
 * @param[out] logits  int16, [out_c]; out_h and out_w are 1
 */
void eft_head_s8(const int8_t *x, const eft_conv_shape *shape, int32_t x_zero_point, const eft_weights *weights,
                 const int32_t *bias, const eft_factors *factors, int16_t *logits);

/**
 * Mean over all pixels of each channel.
 *
 * @param[in] pixels        In [1, 2^22]
 * @param[in] multiplier    With shift: x_scale / (pixels * y_scale)
 * @param[in] x_zero_point  Of x and of y
 */
void eft_global_average_s8(const int8_t *x, int32_t pixels, int32_t channels, int32_t x_zero_point, int32_t multiplier,
                           int32_t shift, int8_t *y);

/** Index of the largest of num_classes >= 1 logits, the first of equals. */
int32_t eft_argmax_s16(const int16_t *logits, int32_t num_classes);

/**
 * Gradient of softmax cross-entropy: p - onehot(label), exponent -15.
 *
 * @param[in]  num_classes  In [1, 65535]
 * @param[in]  label        In [0, num_classes)
 * @param[out] g            [num_classes]
 * @return     The bits of g; 0 when the sample teaches nothing
 */
int32_t eft_softmax_loss_s16(const int16_t *logits, int32_t num_classes, int32_t label, int16_t *g);

/**
 * Gradient of the mean squared difference between outputs and a target: clamp(y[i] - 64 * target[i], -32767, 32767), exponent 0.
 *
 * @param[in] y       Outputs in units of 1/64 of the target's
 * @param[in] target  int8, [count]
 * @return    The bits of g
 */
int32_t eft_squared_loss_s16(const int16_t *y, const int8_t *target, int32_t count, int16_t *g);

/** Mean of ((y[i] - 64 * target[i])^2 >> 12), rounded down: the squared error in units of the target's. count <= 8192. */
int32_t eft_squared_error_s16(const int16_t *y, const int8_t *target, int32_t count);

/**
 * Gradients of eft_multiply_s8.
 *
 * With respect to x: gx = clamp(rsh(g * (z - z_zero_point), s), -32767, 32767), s = max(0, g_bits - 7); with respect to a z of as
 * many pixels the same with x in its place. The exponent grows by s. With respect to a z of one pixel:
 *
 *   cut = max(0, g.bits - (23 - ceil(log2(pixels)))), sum[c] = sum over pixels of rsh(g, cut) * (x - x_zero_point)
 *   gz  = clamp(rsh(sum, s), -32767, 32767), s = max(0, bits of the largest |sum| - 15), exponent g.exponent + cut + s
 *
 * @param[in] mask  Of the tensor whose gradient this is, or NULL
 * @return    The bits of the result
 */
int32_t eft_multiply_grad_s16(const int16_t *g, int32_t g_bits, const int8_t *other, int32_t other_zero_point,
                              int32_t other_pixels, int32_t pixels, int32_t channels, const uint8_t *mask, int16_t *gx);

/** Gradient of eft_concat_s8: gx[p][c] = g[p][first + c], 0 where the mask is 0. Returns the bits of gx. */
int32_t eft_concat_grad_s16(const int16_t *g, int32_t pixels, int32_t channels, int32_t first, int32_t g_channels,
                            const uint8_t *mask, int16_t *gx);

/**
 * Gradient of eft_global_average_s8 with respect to its input. The exponent stays, sigma is divided by pixels.
 *
 * @param[in] x_mask  Mask of the tensor whose gradient this is, or NULL if all of it passes
 * @return    The bits of gx
 */
int32_t eft_global_average_grad_s16(const int16_t *g, int32_t pixels, int32_t channels, const uint8_t *x_mask, int16_t *gx);

/** Constants of eft_conv_input_grad_s16, one set a layer. */
typedef struct {
    const int16_t *channel_scale; /**< round(32767 * scale[o] / max scale), per output channel */
    int32_t operand_bits;         /**< min(15, 24 - ceil(log2(out_c * kernel_h * kernel_w))) */
    int32_t shift;                /**< Of the sums, from a bound on the initial weights; may be negative */
} eft_input_grad;

/**
 * Gradient of a convolution with respect to its input, with the weights as they are now.
 * Its exponent is exponent(g) - (operand_bits - g_bits) + shift.
 *
 * Rows of gx are computed in ascending order. From the first write to row r on, no row of g before
 * ceil((r + pad_h - kernel_h + 1) / stride_h) is read any more, so row r may overlap such rows and what lies before them, but no
 * other.
 *
 * @param[in] g_bits   What the producer of g returned, in [0, 15]
 * @param[in] x_mask   Mask of the layer's input, or NULL if all of it passes
 * @param     scratch  int32, [in_c]
 * @return    The bits of gx
 */
int32_t eft_conv_input_grad_s16(const int16_t *g, int32_t g_bits, const eft_conv_shape *shape, const eft_weights *weights,
                                const eft_input_grad *constants, const uint8_t *x_mask, int16_t *gx, int32_t *scratch);

/** The same for a depthwise convolution; operand_bits is min(15, 24 - ceil(log2(kernel_h * kernel_w))). */
int32_t eft_depthwise_input_grad_s16(const int16_t *g, int32_t g_bits, const eft_conv_shape *shape, const eft_weights *weights,
                                     const eft_input_grad *constants, const uint8_t *x_mask, int16_t *gx, int32_t *scratch);

/** The same in groups; operand_bits is min(15, 24 - ceil(log2(out_c / groups * kernel_h * kernel_w))). */
int32_t eft_grouped_input_grad_s16(const int16_t *g, int32_t g_bits, const eft_conv_shape *shape, int32_t groups,
                                   const eft_weights *weights, const eft_input_grad *constants, const uint8_t *x_mask, int16_t *gx,
                                   int32_t *scratch);

/** Channels [first, first + count) of a tensor of which no others are there: rows of [width][count]. Its mask is whole. */
typedef struct {
    int32_t first, count;
} eft_channels;

/** eft_conv_input_grad_s16 for some input channels. gx does not overlap g. @param scratch int32, [2 * tile->count] */
int32_t eft_conv_input_grad_tile_s16(const int16_t *g, int32_t g_bits, const eft_conv_shape *shape, const eft_weights *weights,
                                     const eft_input_grad *constants, const uint8_t *x_mask, const eft_channels *tile,
                                     int16_t *gx, int32_t *scratch);

/**
 * eft_depthwise_input_grad_s16 for some channels. gx does not overlap g.
 *
 * @param[in] g       From channel tile->first on, whole or the same tile
 * @param[in] g_step  Elements from one pixel of g to the next
 * @param     scratch int32, [tile->count]
 */
int32_t eft_depthwise_input_grad_tile_s16(const int16_t *g, int32_t g_step, int32_t g_bits, const eft_conv_shape *shape,
                                          const eft_weights *weights, const eft_input_grad *constants, const uint8_t *x_mask,
                                          const eft_channels *tile, int16_t *gx, int32_t *scratch);

/**
 * The sums of eft_conv_input_grad_s16, added to what is there: of a layer's output channels by and by. Some of them are a layer of
 * their own: shape->out_c of them, whose weights, scales and gradients begin where the pointers point.
 *
 * @param[in]     g     [out_h][out_w][out_c]
 * @param[in,out] sums  int32, [in_h][in_w][in_c]
 */
void eft_conv_input_sums_s32(const int16_t *g, int32_t g_bits, const eft_conv_shape *shape, const eft_weights *weights,
                             const eft_input_grad *constants, int32_t *sums);

/**
 * Such sums as a gradient: clamp(rsh(sum, shift), -32767, 32767), 0 where the mask is 0.
 *
 * @param[out] gx  May be sums, or lie at a lower address
 * @return     The bits of gx
 */
int32_t eft_store_sums_s16(const int32_t *sums, int32_t count, int32_t shift, const uint8_t *mask, int16_t *gx);

/**
 * Gradient of eft_max_pool_s8: each g goes to the first position of its window (rows, then columns) that holds the largest value.
 * Overlap of gx with g as at eft_conv_input_grad_s16.
 *
 *   gx = clamp(rsh(sum of what arrives, shift), -32767, 32767), 0 where the mask of x is 0. The exponent grows by shift.
 *
 * @param[in] shift  ceil(log2(most windows that a position is in))
 * @return    The bits of gx
 */
int32_t eft_max_pool_grad_s16(const int16_t *g, const int8_t *x, const eft_conv_shape *shape, int32_t shift,
                              const uint8_t *x_mask, int16_t *gx);

/**
 * Gradient of eft_table_s8: gx[i] = clamp(rsh(g[i] * slope[x[i] + 128], g_bits), -32767, 32767), 0 where the mask of x is 0. The
 * exponent grows by g_bits - 15.
 *
 * @param[in]  g_bits What the producer of g returned
 * @param[in]  slope  int16, [256]
 * @param[out] gx     May be g
 * @return     The bits of gx
 */
int32_t eft_table_grad_s16(const int16_t *g, int32_t g_bits, const int8_t *x, const int16_t *slope, int32_t count,
                           const uint8_t *x_mask, int16_t *gx);

/** A gradient tensor as the update kernels take it. */
typedef struct {
    const int16_t *g;
    int32_t bits;
    int32_t exponent;
} eft_gradient;

/**
 * Sum of the two gradients that reach one tensor. b counts in units of multiplier * 2^-shift of a's.
 *
 *   top(a) = a.exponent + a.bits, top(b) = b.exponent + b.bits + 31 - shift; a gradient of 0 bits has none and adds nothing
 *   E      = largest top - 14; a.exponent if there is none
 *   g      = clamp(rsh(a, E - a.exponent) + rsh(b * multiplier, E - b.exponent + shift), -32767, 32767), 0 where the mask is 0
 *
 * @param[in]  b          NULL if there is only one gradient, which then only passes the mask: g = a, E = a.exponent
 * @param[in]  multiplier 0 or in [2^30, 2^31)
 * @param[in]  mask       Of the tensor, or NULL if all of it passes
 * @param[out] g          May be a->g or b->g
 * @param[out] exponent   E
 * @return     The bits of g
 */
int32_t eft_gradient_sum_s16(const eft_gradient *a, const eft_gradient *b, int32_t multiplier, int32_t shift, int32_t count,
                             const uint8_t *mask, int16_t *g, int32_t *exponent);

/**
 * How the steps of one layer's weights, or of its biases, become moves. Steps have 16 fractional bits, what is kept of them
 * 16 - drop.
 *
 *   SGD           move = step
 *   momentum      kept = clamp(rsh(kept * decay, 15) + clamp(rsh(step, drop)), -2^30, 2^30), move = kept * 2^drop
 *   accumulation  kept = clamp(kept + clamp(rsh(step, drop))), move = 0; on the last sample of a batch
 *                 move = rsh(kept * 2^drop, batch_shift), kept = 0
 */
typedef struct {
    int32_t lr_shift;    /**< Number of halvings of the learning rate, in [0, 31] */
    int32_t *kept;       /**< One a parameter, in the order of the parameters; NULL for SGD */
    int32_t drop;        /**< In [0, 15] */
    int32_t decay;       /**< momentum * 2^15, in [1, 32767]; 0 for accumulation */
    int32_t batch_shift; /**< log2 of the samples of a batch */
    int32_t last;        /**< Whether this sample ends a batch */
} eft_optimizer;

/**
 * One step on the trained weights of a convolution: weight gradient and update in one pass, 16-bit master weights.
 * The weight is 256 * trained + residual; it moves by the nearest 1/256.
 *
 * @param[in]     x         The layer's input in the forward pass
 * @param[in]     rate      Learning rate * scales / QAS, per output channel
 * @param[in,out] optimizer Of these weights
 * @param[in,out] trained   [out_c][kernel_h][kernel_w][trained_c]
 * @param[in,out] residual  Same shape
 * @param[in]     trained_c Input channels [0, trained_c) of in_c
 */
void eft_conv_update_master_s8(const int8_t *x, int32_t x_zero_point, const eft_gradient *gradient, const eft_conv_shape *shape,
                               const eft_factors *rate, const eft_optimizer *optimizer, int8_t *trained, int8_t *residual, int32_t trained_c);

/**
 * The same step on int8 weights alone, rounded stochastically: no residual, no more RAM than the weights.
 *
 * @param[in] key         eft_step_key of this step
 * @param[in] first_index Position of the layer's first weight among all weights of the model
 */
void eft_conv_update_stochastic_s8(const int8_t *x, int32_t x_zero_point, const eft_gradient *gradient,
                                   const eft_conv_shape *shape, const eft_factors *rate, const eft_optimizer *optimizer, uint32_t key,
                                   uint32_t first_index, int8_t *trained, int32_t trained_c);

/** The two kinds of step in groups: [out_c][kernel_h][kernel_w][trained_c], the first trained_c channels of each group. */
void eft_grouped_update_master_s8(const int8_t *x, int32_t x_zero_point, const eft_gradient *gradient, const eft_conv_shape *shape,
                                  int32_t groups, const eft_factors *rate, const eft_optimizer *optimizer, int8_t *trained,
                                  int8_t *residual, int32_t trained_c);
void eft_grouped_update_stochastic_s8(const int8_t *x, int32_t x_zero_point, const eft_gradient *gradient,
                                      const eft_conv_shape *shape, int32_t groups, const eft_factors *rate,
                                      const eft_optimizer *optimizer, uint32_t key, uint32_t first_index, int8_t *trained,
                                      int32_t trained_c);

/** See eft_multiply_grad_s16. @param scratch int32, [channels] */
int32_t eft_multiply_factor_grad_s16(const eft_gradient *g, const int8_t *x, int32_t x_zero_point, int32_t pixels,
                                     int32_t channels, const uint8_t *mask, int16_t *gz, int32_t *exponent, int32_t *scratch);

/** The two kinds of step on a depthwise layer: [kernel_h][kernel_w][trained_c]. @param scratch int32, [trained_c] */
void eft_depthwise_update_master_s8(const int8_t *x, int32_t x_zero_point, const eft_gradient *gradient,
                                    const eft_conv_shape *shape, const eft_factors *rate, const eft_optimizer *optimizer, int8_t *trained,
                                    int8_t *residual, int32_t trained_c, int32_t *scratch);
void eft_depthwise_update_stochastic_s8(const int8_t *x, int32_t x_zero_point, const eft_gradient *gradient,
                                        const eft_conv_shape *shape, const eft_factors *rate, const eft_optimizer *optimizer, uint32_t key,
                                        uint32_t first_index, int8_t *trained, int32_t trained_c, int32_t *scratch);

/**
 * The same for count of a layer's trained channels, where x, rate, trained, residual, first_index and what the optimizer keeps
 * begin; a tap has trained_c weights. The gradient has shape->out_c channels, a tile whose first are these.
 *
 * @param scratch int32, [count]
 */
void eft_depthwise_update_master_tile_s8(const int8_t *x, int32_t x_zero_point, const eft_gradient *gradient,
                                         const eft_conv_shape *shape, const eft_factors *rate, const eft_optimizer *optimizer,
                                         int8_t *trained, int8_t *residual, int32_t trained_c, int32_t count, int32_t *scratch);
void eft_depthwise_update_stochastic_tile_s8(const int8_t *x, int32_t x_zero_point, const eft_gradient *gradient,
                                             const eft_conv_shape *shape, const eft_factors *rate, const eft_optimizer *optimizer,
                                             uint32_t key, uint32_t first_index, int8_t *trained, int32_t trained_c, int32_t count,
                                             int32_t *scratch);

/** The random key of a training step. */
uint32_t eft_step_key(uint32_t seed, uint32_t step);

/** One step on the biases of a convolution: bias[o] in [-EFT_BIAS_LIMIT, EFT_BIAS_LIMIT] before and after. */
void eft_bias_update_s32(const eft_gradient *gradient, int32_t pixels, int32_t channels, const eft_factors *rate,
                         const eft_optimizer *optimizer, int32_t *bias);

/**
 * Biases of which only the moves are kept: bias[o] = base[o] + moved[o] * 2^unit, held to EFT_BIAS_LIMIT.
 *
 * A move counts in 1/256 of an output's unit, or in units of the bias where those are larger: unit is shift - 39, in [0, 15].
 *
 * @param[in] shift  Of the factors with which the sums of a convolution become activations
 */
void eft_moved_bias_s32(const int32_t *base, const int16_t *moved, const int8_t *shift, int32_t channels, int32_t *bias);

/** One step on such moves, held to int16. */
void eft_moved_bias_update_s16(const eft_gradient *gradient, int32_t pixels, int32_t channels, const eft_factors *rate,
                               const eft_optimizer *optimizer, const int8_t *shift, int16_t *moved);

/** Words from one place to another that may overlap with it, both aligned to 4; num_bytes is rounded up to whole words. */
void eft_move(void *to, const void *from, uint32_t num_bytes);

/** Bytes from one place to another that does not overlap with it. */
void eft_copy(void *to, const void *from, uint32_t num_bytes);

#endif

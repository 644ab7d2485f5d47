/** Weight gradients and steps of convolutions with AVX2. Not part of the contract. */
#ifndef EFT_AVX2_UPDATE_H
#define EFT_AVX2_UPDATE_H

#include "eft_avx2_tile.h"

#if EFT_AVX2

/** Where steps go. */
typedef struct {
    const eft_factors *rate;
    const eft_optimizer *optimizer;
    int32_t exponent; /**< Of the sums */
    int8_t *trained, *residual; /**< No residual: stochastic rounding */
    uint32_t key;
} eft_moves;

static inline __m256i eft_hash_lanes(__m256i x)
{
    x = _mm256_xor_si256(x, _mm256_srli_epi32(x, 16));
    x = _mm256_mullo_epi32(x, _mm256_set1_epi32(0x7feb352d));
    x = _mm256_xor_si256(x, _mm256_srli_epi32(x, 15));
    x = _mm256_mullo_epi32(x, _mm256_set1_epi32((int32_t)0x846ca68bU));
    return _mm256_xor_si256(x, _mm256_srli_epi32(x, 16));
}

/** Eight int32 as int8, all of which have room. */
static inline void eft_store_eight(__m256i values, int8_t *to)
{
    const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(values), _mm256_extracti128_si256(values, 1));
    _mm_storel_epi64((__m128i *)(void *)to, _mm_packs_epi16(halves, halves));
}

/** Eight weights; shifts are in [33, 62]. */
static inline void eft_move_eight(const eft_moves *m, __m256i sums, __m256i multiplier, __m256i shift, uint32_t number,
                                  int8_t *trained, int8_t *residual)
{
    const __m256i shifted = _mm256_srav_epi32(eft_upper_product(sums, multiplier), _mm256_sub_epi32(shift, _mm256_set1_epi32(33)));
    const __m256i step = _mm256_srai_epi32(_mm256_add_epi32(shifted, _mm256_set1_epi32(1)), 1);
    const __m256i weight = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)trained));
    if (residual != NULL) {
        const __m256i rest = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)residual));
        const __m256i move = _mm256_srai_epi32(_mm256_add_epi32(step, _mm256_set1_epi32(128)), 8);
        __m256i master = _mm256_sub_epi32(_mm256_add_epi32(_mm256_slli_epi32(weight, 8), rest), move);
        master = _mm256_min_epi32(_mm256_max_epi32(master, _mm256_set1_epi32(-32640)), _mm256_set1_epi32(32639));
        const __m256i upper = _mm256_srai_epi32(_mm256_add_epi32(master, _mm256_set1_epi32(128)), 8);
        eft_store_eight(upper, trained);
        eft_store_eight(_mm256_sub_epi32(master, _mm256_slli_epi32(upper, 8)), residual);
    } else {
        const __m256i numbers = _mm256_add_epi32(_mm256_set1_epi32((int32_t)number), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
        const __m256i hashed = eft_hash_lanes(_mm256_xor_si256(_mm256_set1_epi32((int32_t)m->key), numbers));
        const __m256i move = _mm256_srai_epi32(_mm256_add_epi32(step, _mm256_srli_epi32(hashed, 16)), 16);
        const __m256i moved = _mm256_sub_epi32(weight, move);
        eft_store_eight(_mm256_max_epi32(moved, _mm256_set1_epi32(-127)), trained);
    }
}

/** Whether some of the first count shifts leave [33, 62]. */
static inline int eft_some_near(const __m256i *shift, int32_t count)
{
    int some = 0;
    for (int32_t i = 0; 8 * i < count; i++) {
        const __m256i low = _mm256_cmpgt_epi32(_mm256_set1_epi32(33), shift[i]);
        const __m256i high = _mm256_cmpgt_epi32(shift[i], _mm256_set1_epi32(62));
        const uint32_t lanes = (uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_or_si256(low, high)));
        some |= (lanes & (count - 8 * i < 8 ? (1U << (uint32_t)(count - 8 * i)) - 1U : 255U)) != 0U;
    }
    return some;
}

/**
 * Move weights [index, index + count), at most EFT_LANES.
 *
 * @param[in] channel  Whose rate the first has
 * @param[in] apart    1 if the next weight has that of the next channel, 0 if all have the same
 * @param[in] number   Of the first among all weights of the model
 */
static inline void eft_move_lanes(const eft_moves *m, const int32_t *sums, int32_t count, int32_t channel, int32_t apart,
                                  int32_t index, uint32_t number)
{
    const __m256i change = _mm256_set1_epi32(m->optimizer->lr_shift - m->exponent - 16);
    __m256i multiplier[2], shift[2];
    for (int32_t i = 0; i < 2; i++) {
        if (apart != 0) {
            const int32_t first = eft_least(count, 8 * i);
            multiplier[i] = eft_some_words(m->rate->multiplier + channel + first, count - first);
            shift[i] = _mm256_cvtepi8_epi32(eft_some_bytes(m->rate->shift + channel + first, count - first));
        } else {
            multiplier[i] = _mm256_set1_epi32(m->rate->multiplier[channel]);
            shift[i] = _mm256_set1_epi32(m->rate->shift[channel]);
        }
        shift[i] = _mm256_add_epi32(shift[i], change);
    }
    if (m->optimizer->kept != NULL || eft_some_near(shift, count)) {
        for (int32_t i = 0; i < count; i++) {
            const int32_t of = channel + i * apart;
            const int32_t right = m->rate->shift[of] - m->exponent - 16 + m->optimizer->lr_shift;
            const int64_t whole = eft_rsh((int64_t)sums[i] * m->rate->multiplier[of], right);
            const int64_t step = eft_optimized(m->optimizer, index + i, whole);
            if (m->residual != NULL) {
                eft_move_master(m->trained + index + i, m->residual + index + i, step);
            } else {
                eft_move_stochastic(m->trained + index + i, step, m->key, number + (uint32_t)i);
            }
        }
        return;
    }
    for (int32_t i = 0; i < count; i += 8) {
        const __m256i eight = eft_load256(sums + i), by = multiplier[i >> 3], right = shift[i >> 3];
        int8_t *const trained = m->trained + index + i;
        int8_t *const residual = m->residual != NULL ? m->residual + index + i : NULL;
        if (count - i >= 8) {
            eft_move_eight(m, eight, by, right, number + (uint32_t)i, trained, residual);
        } else {
            const size_t rest = (size_t)(count - i);
            int8_t weights[8] = {0}, residuals[8] = {0};
            memcpy(weights, trained, rest);
            if (residual != NULL) {
                memcpy(residuals, residual, rest);
            }
            eft_move_eight(m, eight, by, right, number + (uint32_t)i, weights, residual != NULL ? residuals : NULL);
            memcpy(trained, weights, rest);
            if (residual != NULL) {
                memcpy(residual, residuals, rest);
            }
        }
    }
}

/** Output channels at a time. */
#define EFT_GRADIENTS 48

/** Pixels at a time, and their gradients by pairs. */
#define EFT_PIXELS 1024
#define EFT_GRADIENT_PAIRS 8192

/** Most bytes of an input unfolded: of layers with few channels, which would fill few lanes. */
#define EFT_UNFOLDED 32768

/** Gradients of pixels [first, first + count) by pairs: [pair][channels][2]; an odd one is paired with 0. */
static inline void eft_pack_gradients(const int16_t *g, int32_t out_c, int32_t first, int32_t count, int32_t channels, int32_t cut,
                                      int16_t *to)
{
    for (int32_t p = first; p < first + count; p += 2) {
        const int16_t *const x = g + (ptrdiff_t)p * out_c;
        const int16_t *const z = p + 1 < first + count ? x + out_c : NULL;
        int32_t c = 0;
        for (; c + 16 <= channels; c += 16) {
            const __m256i a = eft_cut_gradients(eft_load256(x + c), cut);
            const __m256i b = z != NULL ? eft_cut_gradients(eft_load256(z + c), cut) : _mm256_setzero_si256();
            const __m256i low = _mm256_unpacklo_epi16(a, b), high = _mm256_unpackhi_epi16(a, b);
            eft_store256(to + 2 * c, _mm256_permute2x128_si256(low, high, 0x20));
            eft_store256(to + 2 * c + 16, _mm256_permute2x128_si256(low, high, 0x31));
        }
        for (; c < channels; c++) {
            to[2 * c] = (int16_t)eft_rsh32(x[c], cut);
            to[2 * c + 1] = z != NULL ? (int16_t)eft_rsh32(z[c], cut) : (int16_t)0;
        }
        to += 2 * channels;
    }
}

/** Where the inputs of pixels [first, first + count) are that place (ky, kx) of the kernel sees; NULL where there are none. */
static inline void eft_list_inputs(const int8_t *x, const eft_conv_shape *s, int32_t ky, int32_t kx, int32_t first, int32_t count,
                                   const int8_t **to)
{
    int32_t oy = first / s->out_w, ox = first % s->out_w;
    while (count > 0) {
        const int32_t iy = oy * s->stride_h - s->pad_h + ky;
        const int32_t n = eft_least(s->out_w - ox, count);
        const int8_t *const row = iy >= 0 && iy < s->in_h ? x + (ptrdiff_t)iy * s->in_w * s->in_c : NULL;
        for (int32_t i = 0; i < n; i++) {
            const int32_t ix = (ox + i) * s->stride_w - s->pad_w + kx;
            *to++ = row != NULL && ix >= 0 && ix < s->in_w ? row + (ptrdiff_t)ix * s->in_c : NULL;
        }
        count -= n;
        ox = 0;
        oy++;
    }
}

/** Inputs of listed pixels by pairs, channels [first, first + columns). */
static inline void eft_pack_inputs(const int8_t *const *from, int32_t count, int32_t first, int32_t columns, int32_t zero_point,
                                   int16_t *to)
{
    const __m256i minus = _mm256_set1_epi16((int16_t)zero_point);
    const __m128i nothing = _mm_set1_epi8((int8_t)zero_point);
    for (int32_t p = 0; p < count; p += 2) {
        const int8_t *const second = p + 1 < count ? from[p + 1] : NULL;
        const __m128i x = from[p] != NULL ? eft_some_bytes(from[p] + first, columns) : nothing;
        const __m128i z = second != NULL ? eft_some_bytes(second + first, columns) : nothing;
        eft_pack_pair(x, z, minus, columns, to);
        to += 2 * eft_panel_lanes(columns);
    }
}

/** What all places of the kernel see of the input, in the order of the weights, for each pixel. */
static inline void eft_unfold(const int8_t *x, const eft_conv_shape *s, int32_t zero_point, int8_t *to)
{
    for (int32_t oy = 0; oy < s->out_h; oy++) {
        for (int32_t ox = 0; ox < s->out_w; ox++) {
            const int32_t left = (ox * s->stride_w - s->pad_w) * s->in_c;
            const int32_t length = s->kernel_w * s->in_c;
            /* The part [before, end) of a row of the kernel that lies on the input. */
            const int32_t before = left < 0 ? eft_least(-left, length) : 0;
            const int32_t end = eft_least(length, s->in_w * s->in_c - left);
            for (int32_t ky = 0; ky < s->kernel_h; ky++) {
                const int32_t iy = oy * s->stride_h - s->pad_h + ky;
                if (iy < 0 || iy >= s->in_h || end <= before) {
                    memset(to, zero_point, (size_t)length);
                } else {
                    const int8_t *const row = x + (ptrdiff_t)iy * s->in_w * s->in_c + left;
                    for (int32_t i = 0; i < before; i++) {
                        to[i] = (int8_t)zero_point;
                    }
                    for (int32_t i = before; i < end; i++) {
                        to[i] = row[i];
                    }
                    for (int32_t i = end; i < length; i++) {
                        to[i] = (int8_t)zero_point;
                    }
                }
                to += length;
            }
        }
    }
}

/** Weight gradients and steps of a dense layer. */
static inline void eft_conv_update_avx2(const int8_t *x, int32_t x_zero_point, const eft_gradient *gradient,
                                        const eft_conv_shape *shape, const eft_factors *rate, const eft_optimizer *optimizer,
                                        uint32_t key, uint32_t first_index, int8_t *trained, int8_t *residual, int32_t trained_c)
{
    const eft_conv_shape *s = shape;
    const int32_t pixels = s->out_h * s->out_w;
    const int32_t cut = eft_cut(gradient->bits, pixels);
    const eft_moves moves = {rate, optimizer, gradient->exponent + cut, trained, residual, key};
    /* A whole row of the kernel at once, if all its places are on the input for all outputs. */
    const int inside = s->pad_w == 0 && (s->out_w - 1) * s->stride_w + s->kernel_w <= s->in_w && trained_c == s->in_c;
    const int32_t all_c = s->kernel_h * s->kernel_w * s->in_c;
    const eft_conv_shape pointwise = {1, pixels, all_c, 1, pixels, s->out_c, 1, 1, 1, 1, 0, 0};
    int32_t per_row = inside ? 1 : s->kernel_w;
    int32_t length = inside ? s->kernel_w * trained_c : trained_c;
    int8_t unfolded[EFT_UNFOLDED];
    int16_t gradients[2 * EFT_GRADIENT_PAIRS], inputs[EFT_PIXELS * EFT_LANES];
    const int8_t *places[EFT_PIXELS];
    int32_t sums[EFT_GRADIENTS * EFT_LANES];
    if (s->kernel_h * per_row > 1 && length < EFT_LANES && trained_c == s->in_c && pixels * all_c <= EFT_UNFOLDED) {
        /* A pointwise layer of what all places see. */
        eft_unfold(x, s, x_zero_point, unfolded);
        x = unfolded;
        s = &pointwise;
        trained_c = length = all_c;
        per_row = 1;
    }
    for (int32_t o = 0; o < s->out_c; o += EFT_GRADIENTS) {
        const int32_t channels = eft_least(EFT_GRADIENTS, s->out_c - o);
        const int32_t some = eft_least(EFT_PIXELS, 2 * (EFT_GRADIENT_PAIRS / channels));
        const eft_rows16 a = {gradients, 2, 2 * channels};
        for (int32_t run = 0; run < s->kernel_h * per_row; run++) {
            const int32_t ky = run / per_row, kx = run % per_row;
            for (int32_t first = 0; first < length; first += EFT_LANES) {
                const int32_t columns = eft_least(EFT_LANES, length - first);
                memset(sums, 0, sizeof sums);
                for (int32_t p = 0; p < pixels; p += some) {
                    const int32_t count = eft_least(some, pixels - p);
                    const eft_run all = {0, 0, (count + 1) / 2};
                    if (pixels > some || (run == 0 && first == 0)) {
                        eft_pack_gradients(gradient->g + o, s->out_c, p, count, channels, cut, gradients);
                    }
                    if (pixels > some || first == 0) {
                        eft_list_inputs(x, s, ky, kx, p, count, places);
                    }
                    eft_pack_inputs(places, count, first, columns, x_zero_point, inputs);
                    for (int32_t c = 0; c < channels;) {
                        const int32_t n = eft_tile_rows(channels - c);
                        eft_rows16 rows = a;
                        rows.at += 2 * c;
                        eft_tile(n, columns, &rows, inputs, &all, 1, sums + c * EFT_LANES, EFT_LANES, sums + c * EFT_LANES);
                        c += n;
                    }
                }
                for (int32_t c = 0; c < channels; c++) {
                    const int32_t row = (o + c) * s->kernel_h + ky;
                    const int32_t index = row * s->kernel_w * trained_c + kx * trained_c + first;
                    const int32_t number = row * s->kernel_w * s->in_c + kx * s->in_c + first;
                    eft_move_lanes(&moves, sums + c * EFT_LANES, columns, o + c, 0, index, first_index + (uint32_t)number);
                }
            }
        }
    }
}

#endif

#endif

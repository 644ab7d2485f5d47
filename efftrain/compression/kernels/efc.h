/*
 * Fused passes over large tensors, for codecs on a CPU. Plain C11: no malloc, no stdio, no globals; the caller brings all
 * memory. The NumPy code of each codec is the definition, and every kernel gives the same bits: sums, products and
 * quotients are IEEE float32, one rounding each, so build with -ffp-contract=off and without -ffast-math.
 *
 * Arrays do not overlap. A function that can meet inf or NaN returns EFC_NON_FINITE; its outputs are then unspecified.
 */
#ifndef EFC_H
#define EFC_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define EFC_OK 0
#define EFC_NON_FINITE 1
#define EFC_MALFORMED 2

#if defined(_WIN32)
#define EFC_API __declspec(dllexport)
#else
#define EFC_API
#endif

/** Bits of |x|: magnitudes in the order of uint32; what is EFC_INFINITY or above is inf or NaN. */
static inline uint32_t efc_magnitude(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits & 0x7fffffffu;
}
#define EFC_INFINITY 0x7f800000u

/** The largest efc_magnitude of n elements; 0 of none. */
static inline uint32_t efc_largest_magnitude(const float *x, int64_t n)
{
    uint32_t largest = 0;
    for (int64_t i = 0; i < n; i++) {
        const uint32_t magnitude = efc_magnitude(x[i]);
        largest = magnitude > largest ? magnitude : largest;
    }
    return largest;
}

/** The float32 at any address. */
static inline float efc_read_f32(const uint8_t *at)
{
    float x;
    memcpy(&x, at, sizeof x);
    return x;
}

/** Whether all scales are in [0, largest_scale], which NaN is not, and all integers at least -levels. */
static inline int32_t efc_check_quantized(const uint8_t *scales, const int8_t *q, int64_t n, int64_t block,
                                          int32_t levels, float largest_scale)
{
    int32_t num_bad = 0;
    for (int64_t first = 0; first < n; first += block, scales += sizeof(float)) {
        const float scale = efc_read_f32(scales);
        num_bad += !(scale >= 0.0f && scale <= largest_scale);
    }
    int8_t least = 0;
    for (int64_t i = 0; i < n; i++) {
        least = q[i] < least ? q[i] : least;
    }
    return num_bad || least < -levels ? EFC_MALFORMED : EFC_OK;
}

/** Number of the lowest bit that is set; there is one. */
static inline int32_t efc_lowest_bit(uint64_t word)
{
#if defined(__GNUC__)
    return __builtin_ctzll(word);
#else
    int32_t bit = 0;
    for (; !(word & 1u); word >>= 1) {
        bit++;
    }
    return bit;
#endif
}

/** Fetch a cache line for writing. Stores wait for each other, so of scattered ones each would wait for memory. */
static inline void efc_will_write(const void *at)
{
#if defined(__GNUC__)
    __builtin_prefetch(at, 1);
#else
    (void)at;
#endif
}
#define EFC_AHEAD 32 /* scattered elements that are fetched ahead */

static inline float efc_as_float(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline float efc_abs(float x)
{
    return efc_as_float(efc_magnitude(x));
}

static inline uint32_t efc_sign(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits & 0x80000000u;
}

/* 16-bit codes of a message, at any address, little endian. */
static inline uint32_t efc_load_u16(const uint8_t *from)
{
    uint16_t code;
    memcpy(&code, from, sizeof code);
    return code;
}

static inline void efc_store_u16(uint8_t *to, uint32_t code)
{
    const uint16_t low = (uint16_t)code;
    memcpy(to, &low, sizeof low);
}

/* Finite x, rounded half to even; what is too large becomes the largest number. Both ways are found and one taken, so
   that loops become vector code. Below 2^-14, adding 0.5 rounds to a multiple of 2^-24, which then stands in the lowest
   bits. */
static inline uint32_t efc_to_fp16(float x)
{
    const uint32_t magnitude = efc_magnitude(x);
    const uint32_t held = magnitude > 0x477fe000u ? 0x477fe000u : magnitude;
    const uint32_t normal = (held + 0xfffu + ((held >> 13) & 1u) - 0x38000000u) >> 13;
    const float small = efc_as_float(held) + 0.5f;
    const uint32_t denormal = efc_magnitude(small) - 0x3f000000u;
    return (efc_sign(x) >> 16) | (held < 0x38800000u ? denormal : normal);
}

static inline uint32_t efc_to_bf16(float x)
{
    const uint32_t magnitude = efc_magnitude(x);
    const uint32_t rounded = (magnitude + 0x7fffu + ((magnitude >> 16) & 1u)) >> 16;
    return (efc_sign(x) >> 16) | (rounded > 0x7f7fu ? 0x7f7fu : rounded);
}

/* Any code but those of inf and NaN. No float32 denormal occurs, which would be slow. */
static inline float efc_from_fp16(uint32_t code)
{
    const uint32_t magnitude = (code & 0x7fffu) << 13;
    const float normal = efc_as_float(magnitude + 0x38000000u);
    const float denormal = efc_as_float(magnitude + 0x38800000u) - 0x1p-14f;
    const float x = magnitude < 0x00800000u ? denormal : normal;
    return efc_as_float(efc_magnitude(x) | ((code & 0x8000u) << 16));
}

static inline float efc_from_bf16(uint32_t code)
{
    return efc_as_float(code << 16);
}

/**
 * Add two tensors and find the largest magnitudes of the sum, in one pass over memory where a sample guesses the
 * threshold well enough, in a few where it does not. The result never depends on the sample.
 *
 * @param[in]  a       [n]
 * @param[in]  b       [n], or NULL: the sum is a
 * @param[in]  n       1 <= n < 2^31
 * @param[in]  k       1 <= k <= n
 * @param[out] sum     [n], a + b; may be NULL if b is
 * @param[out] places  [room]; the first k are the places of the k largest magnitudes of the sum, ascending; of equal
 *                     magnitudes the lowest places. The rest is scratch
 * @param[out] values  [room]; the first k are the sum at those places. The rest is scratch
 * @param[in]  room    >= k; one pass needs room for the candidates, about 1.3 k + 300
 * @return EFC_OK or EFC_NON_FINITE
 */
EFC_API int32_t efc_top_k_f32(const float *restrict a, const float *restrict b, int64_t n, int64_t k,
                              float *restrict sum, int64_t *restrict places, float *restrict values, int64_t room);

/**
 * Quantize the sum of two tensors to integers with one scale a block, and keep what the integers do not say.
 *
 *   x = a + b,  scale = min(max|x| / levels, largest_scale),
 *   q = clamp(round_half_even(x / scale), -levels, levels),  left = x - q * scale
 *
 * A block whose scale is 0 (all zero, or it underflows) gives q = 0.
 *
 * @param[in]  a       [n]
 * @param[in]  b       [n], or NULL: x = a
 * @param[in]  n       >= 0
 * @param[in]  block   elements that share a scale, >= 1
 * @param[in]  levels  1 to 127
 * @param[in]  largest_scale  levels * largest_scale must not overflow
 * @param[out] scales  [4 * ceil(n / block)]: float32 as a payload has them, at any address
 * @param[out] q       [n]
 * @param[out] left    [n]; may be NULL if b is
 * @return EFC_OK or EFC_NON_FINITE
 */
EFC_API int32_t efc_quantize_f32(const float *restrict a, const float *restrict b, int64_t n, int64_t block,
                                 int32_t levels, float largest_scale, uint8_t *restrict scales, int8_t *restrict q,
                                 float *restrict left);

/**
 * Back to floats:  out = q * scale.
 *
 * @param[in]  scales  [4 * ceil(n / block)]: float32 as a payload has them, at any address
 * @param[in]  q       [n]
 * @param[in]  n       >= 0
 * @param[in]  block   elements that share a scale, >= 1
 * @param[in]  levels  1 to 127
 * @param[in]  largest_scale  levels * largest_scale must not overflow
 * @param[out] out     [n]
 * @return EFC_OK; EFC_MALFORMED if an integer is below -levels, or a scale not in [0, largest_scale]: nothing is written
 */
EFC_API int32_t efc_dequantize_f32(const uint8_t *restrict scales, const int8_t *restrict q, int64_t n, int64_t block,
                                   int32_t levels, float largest_scale, float *restrict out);

/**
 * Add in double:  out += weight * a.
 *
 * @param[in]     a       [n]
 * @param[in]     n       >= 0
 * @param[in]     weight  any
 * @param[in,out] out     [n]
 */
EFC_API void efc_add_f64(const float *restrict a, int64_t n, double weight, double *restrict out);

/**
 * Back to floats and add:  out += weight * (q * scale).
 *
 * @param[in]     scales  [4 * ceil(n / block)]: float32 as a payload has them, at any address
 * @param[in]     q       [n]
 * @param[in]     n       >= 0
 * @param[in]     block   elements that share a scale, >= 1
 * @param[in]     levels  1 to 127
 * @param[in]     largest_scale  levels * largest_scale must not overflow
 * @param[in]     weight  any
 * @param[in,out] out     [n]
 * @return as efc_dequantize_f32
 */
EFC_API int32_t efc_dequantize_add_f32(const uint8_t *restrict scales, const int8_t *restrict q, int64_t n,
                                       int64_t block, int32_t levels, float largest_scale, float weight,
                                       float *restrict out);

/**
 * Signs of the sum of two tensors with the mean magnitude of each block, and what they do not say.
 *
 *   x = a + b,  scale = mean|x|,  bit = x < 0,  left = x - (bit ? -scale : scale)
 *
 * The mean is of 16 sums in double, of the elements i with equal i mod 16 in the block, added in halves: 0 + 8, 1 + 9,
 * and so on.
 *
 * @param[in]     a       [n]
 * @param[in]     b       [n], or NULL: x = a
 * @param[in]     n       >= 0
 * @param[in]     block   elements that share a scale, >= 1
 * @param[out]    scales  [ceil(n / block)]
 * @param[in,out] packed  [ceil(n / 8)], the bits from the lowest up; the caller clears it
 * @param[out]    left    [n]; may be NULL if b is
 * @return EFC_OK or EFC_NON_FINITE
 */
EFC_API int32_t efc_sign_encode_f32(const float *restrict a, const float *restrict b, int64_t n, int64_t block,
                                    float *restrict scales, uint8_t *restrict packed, float *restrict left);

/**
 * Back to floats:  out = bit ? -scale : scale.
 *
 * @param[in]  scales  [ceil(n / block)], >= 0
 * @param[in]  packed  [ceil(n / 8)]
 * @param[in]  n       >= 0
 * @param[in]  block   elements that share a scale, >= 1
 * @param[out] out     [n]
 */
EFC_API void efc_sign_decode_f32(const float *restrict scales, const uint8_t *restrict packed, int64_t n, int64_t block,
                                 float *restrict out);

/**
 * Back to floats and add:  out += weight * (bit ? -scale : scale).
 *
 * @param[in]     scales  [ceil(n / block)], >= 0
 * @param[in]     packed  [ceil(n / 8)]
 * @param[in]     n       >= 0
 * @param[in]     block   elements that share a scale, >= 1
 * @param[in]     weight  any
 * @param[in,out] out     [n]
 */
EFC_API void efc_sign_decode_add_f32(const float *restrict scales, const uint8_t *restrict packed, int64_t n,
                                     int64_t block, float weight, float *restrict out);

/**
 * Round the sum of two tensors to 16-bit floats, half to even, and keep what they do not say. Magnitudes beyond the
 * largest number become it.
 *
 * @param[in]  a      [n]
 * @param[in]  b      [n], or NULL: the sum is a
 * @param[in]  n      >= 0
 * @param[in]  bf16   0: binary16, 1: the upper half of binary32
 * @param[out] codes  [2 * n], little endian, at any address
 * @param[out] left   [n]; may be NULL if b is
 * @return EFC_OK or EFC_NON_FINITE
 */
EFC_API int32_t efc_half_encode_f32(const float *restrict a, const float *restrict b, int64_t n, int32_t bf16,
                                    uint8_t *restrict codes, float *restrict left);

/**
 * Back to floats.
 *
 * @param[in]  codes  [2 * n], as efc_half_encode_f32 writes them
 * @param[in]  n      >= 0
 * @param[in]  bf16   as there
 * @param[out] out    [n]
 * @return EFC_OK, or EFC_NON_FINITE: a code is that of inf or NaN
 */
EFC_API int32_t efc_half_decode_f32(const uint8_t *restrict codes, int64_t n, int32_t bf16, float *restrict out);

/**
 * Back to floats and add:  out += weight * x.
 *
 * @param[in]     codes   [2 * n], as efc_half_encode_f32 writes them
 * @param[in]     n       >= 0
 * @param[in]     bf16    as there
 * @param[in]     weight  any
 * @param[in,out] out     [n]; not changed if there is a bad code
 * @return EFC_OK, or EFC_NON_FINITE: a code is that of inf or NaN
 */
EFC_API int32_t efc_half_decode_add_f32(const uint8_t *restrict codes, int64_t n, int32_t bf16, float weight,
                                        float *restrict out);

/**
 * Elias-Fano code of ascending places: `low` bits of each packed as they are, the rest in unary.
 *
 * @param[in]  places  [k], strictly ascending, >= 0
 * @param[in]  k       >= 0
 * @param[in]  low     0 to 31
 * @param[out] lows    [ceil(k * low / 8)]
 * @param[out] highs   bitmap; bit (places[i] >> low) + i is set. The caller clears it and makes it long enough
 */
EFC_API void efc_index_encode_s64(const int64_t *restrict places, int64_t k, int32_t low, uint8_t *restrict lows,
                                  uint8_t *restrict highs);

/**
 * Inverse of efc_index_encode_s64, for bytes from anywhere.
 *
 * @param[in]  lows        [ceil(k * low / 8)]
 * @param[in]  highs       [num_highs]
 * @param[in]  num_highs   >= 0
 * @param[in]  k           >= 1
 * @param[in]  n           bound of the places, <= 2^48
 * @param[in]  low         0 to 31
 * @param[out] places      [k]
 * @return EFC_OK, or EFC_MALFORMED: not k strictly ascending places below n
 */
EFC_API int32_t efc_index_decode_s64(const uint8_t *restrict lows, const uint8_t *restrict highs, int64_t num_highs,
                                     int64_t k, int64_t n, int32_t low, int64_t *restrict places);

/**
 * out[places[i]] = values[i]
 *
 * @param[in]     places  [k], each below the length of out, no place twice
 * @param[in]     values  [k]
 * @param[in]     k       >= 0
 * @param[in,out] out     long enough for all places
 */
EFC_API void efc_scatter_f32(const int64_t *restrict places, const float *restrict values, int64_t k,
                             float *restrict out);

/**
 * out[places[i]] += weight * values[i]
 *
 * @param[in]     places  [k], each below the length of out, no place twice
 * @param[in]     values  [k]
 * @param[in]     k       >= 0
 * @param[in]     weight  factor
 * @param[in,out] out     long enough for all places
 */
EFC_API void efc_scatter_add_f32(const int64_t *restrict places, const float *restrict values, int64_t k, float weight,
                                 float *restrict out);

/**
 * The sum of two sparse tensors, a + weight * b.
 *
 * @param[in]  places_a  [k_a], strictly ascending
 * @param[in]  values_a  [k_a]
 * @param[in]  k_a       >= 0
 * @param[in]  places_b  [k_b], strictly ascending
 * @param[in]  values_b  [k_b]
 * @param[in]  k_b       >= 0
 * @param[in]  weight    factor of b
 * @param[out] places    [k_a + k_b]; the first k are strictly ascending, the rest is untouched
 * @param[out] values    [k_a + k_b]
 * @return k, the number of places of either
 */
EFC_API int64_t efc_merge_f32(const int64_t *restrict places_a, const float *restrict values_a, int64_t k_a,
                              const int64_t *restrict places_b, const float *restrict values_b, int64_t k_b,
                              float weight, int64_t *restrict places, float *restrict values);

/**
 * Keep the lowest bits of each code, packed from the lowest bit of the first byte up.
 *
 * @param[in]  codes   [n], only the lowest bits count
 * @param[in]  n       >= 0
 * @param[in]  bits    1, 2, 4 or 6
 * @param[out] packed  [ceil(n * bits / 8)]; bits beyond the last code are 0
 */
EFC_API void efc_pack_u8(const uint8_t *restrict codes, int64_t n, int32_t bits, uint8_t *restrict packed);

/**
 * Inverse of efc_pack_u8; the bits above the code are 0.
 *
 * @param[in]  packed  [ceil(n * bits / 8)]
 * @param[in]  n       >= 0
 * @param[in]  bits    1, 2, 4 or 6
 * @param[out] codes   [n]
 */
EFC_API void efc_unpack_u8(const uint8_t *restrict packed, int64_t n, int32_t bits, uint8_t *restrict codes);

/** A number format of few bits: sign, exponent, mantissa; or, without exponent, fixed point. */
typedef struct {
    int32_t bits;            /* of a code, 4 to 8 */
    int32_t mantissa_bits;   /* behind the point */
    int32_t least_exponent;  /* of numbers of full precision; smaller ones are multiples of the same step */
    float largest;           /* number; what is larger becomes it */
    int32_t twos_complement; /* codes are integers, not sign and magnitude */
    float largest_scale;     /* > 0: a scale is max|x| / largest, cut to this; 0: it is a power of two, and */
    int32_t largest_exponent;/* the exponent of max|x| / scale is this, if scale > 2^-127 */
} efc_minifloat;

/**
 * Round the sum of two tensors to small floats with one scale a block, and keep what they do not say.
 *
 *   x = a + b,  code of clamp(x / scale, -largest, largest), rounded half to even,  left = x - value(code) * scale
 *
 * A block whose scale is 0 (all zero, or it underflows) gives code 0.
 *
 * @param[in]  a       [n]
 * @param[in]  b       [n], or NULL: x = a
 * @param[in]  n       >= 0
 * @param[in]  block   elements that share a scale, >= 1
 * @param[in]  format  as above
 * @param[out] scales  [ceil(n / block)]
 * @param[out] codes   [n]
 * @param[out] left    [n]; may be NULL if b is
 * @return EFC_OK or EFC_NON_FINITE
 */
EFC_API int32_t efc_minifloat_f32(const float *restrict a, const float *restrict b, int64_t n, int64_t block,
                                  efc_minifloat format, float *restrict scales, uint8_t *restrict codes,
                                  float *restrict left);

/**
 * Codes of few bits back to floats, by a table:  out = table[code] * scale,  or  out += weight * (table[code] * scale).
 *
 * @param[in]     packed  [ceil(n * bits / 8)], as efc_pack_u8 writes them
 * @param[in]     n       >= 0
 * @param[in]     bits    1, 2, 4, 6 or 8
 * @param[in]     table   [2^bits]; NaN for codes that nobody writes
 * @param[in]     scales  [ceil(n / block)]
 * @param[in]     block   elements that share a scale, >= 1
 * @param[in]     weight  NULL: overwrite out
 * @param[in,out] out     [n]; unchanged if the codes are malformed
 * @return EFC_OK, or EFC_MALFORMED: a product of table and scale is inf or NaN
 */
EFC_API int32_t efc_lookup_f32(const uint8_t *restrict packed, int64_t n, int32_t bits, const float *restrict table,
                               const float *restrict scales, int64_t block, const float *weight, float *restrict out);

/**
 * Ternary digits of the sum of two tensors, given the random numbers, and what they do not say.
 *
 *   x = a + b,  scale = max|x|,  digit = noise < |x / scale| ? (x < 0 ? 2 : 1) : 0,
 *   left = x - (digit == 1 ? scale : digit == 2 ? -scale : 0)
 *
 * @param[in]  a       [n]
 * @param[in]  b       [n], or NULL: x = a
 * @param[in]  noise   [n], in [0, 1)
 * @param[in]  n       >= 0
 * @param[in]  block   elements that share a scale, >= 1
 * @param[out] scales  [ceil(n / block)]
 * @param[out] digits  [n]
 * @param[out] left    [n]; may be NULL if b is
 * @return EFC_OK or EFC_NON_FINITE
 */
EFC_API int32_t efc_ternary_f32(const float *restrict a, const float *restrict b, const float *restrict noise,
                                int64_t n, int64_t block, float *restrict scales, uint8_t *restrict digits,
                                float *restrict left);

/**
 * Five digits of base 3 in each byte, the first one the least significant.
 *
 * @param[in]  digits  [n], 0 to 2
 * @param[in]  n       >= 0
 * @param[out] packed  [ceil(n / 5)]; digits behind the last one are 0
 */
EFC_API void efc_pack_3_u8(const uint8_t *restrict digits, int64_t n, uint8_t *restrict packed);

/**
 * Inverse of efc_pack_3_u8.
 *
 * @param[in]  packed     [num_bytes]; a byte above 242 gives 3 for its last digit
 * @param[in]  num_bytes  >= 0
 * @param[out] digits     [5 * num_bytes]
 */
EFC_API void efc_unpack_3_u8(const uint8_t *restrict packed, int64_t num_bytes, uint8_t *restrict digits);

/**
 * Find the elements of at least some magnitude.
 *
 * @param[in]  x          [n]
 * @param[in]  n          >= 0
 * @param[in]  threshold  >= 0
 * @param[out] places     [room], ascending
 * @param[in]  room       >= 0
 * @return how many there are, or room + 1 if they are more than room
 */
EFC_API int64_t efc_at_least_f32(const float *restrict x, int64_t n, float threshold, int64_t *restrict places,
                                 int64_t room);

#endif

#include "efc.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define CHUNK 16     /* elements tested at once for a candidate */
#define SAMPLE 16384 /* elements that guess the threshold */
#define RUN 4        /* neighbors in the sample, on one cache line: the way to memory is what an element costs */
#define NONE 0x7fffffffu /* as a floor: nothing is looked for */

/** The k-th largest magnitude, and how many of exactly that magnitude belong to the k largest. */
typedef struct {
    uint32_t magnitude;
    int64_t num_ties;
} cut;

/** Elements of at least the magnitude `floor`, found so far. */
typedef struct {
    int64_t *places;
    float *values;
    int64_t room;
    int64_t found;
    uint32_t floor;
} candidates;

/* Radix select: 11, 10 and 10 bits of the magnitude a pass. */
static cut find_cut(const float *v, int64_t n, int64_t k)
{
    static const int32_t shifts[3] = {20, 10, 0};
    static const uint32_t num_bins[3] = {2048, 1024, 1024};
    uint32_t prefix = 0;
    for (int32_t pass = 0; pass < 3; pass++) {
        uint32_t count[2048] = {0};
        const int32_t shift = shifts[pass];
        const uint32_t mask = num_bins[pass] - 1;
        const uint32_t above = prefix * num_bins[pass]; /* 0 in the first pass, as are the bits above its bins */
        for (int64_t i = 0; i < n; i++) {
            const uint32_t key = efc_magnitude(v[i]) >> shift;
            count[key & mask] += (key & ~mask) == above;
        }
        uint32_t bin = mask;
        while (k > count[bin]) {
            k -= count[bin];
            bin--;
        }
        prefix = above + bin;
    }
    return (cut){prefix, k};
}

/* A magnitude that the k-th largest of n most likely exceeds, or 0 where a sample says nothing useful. */
static uint32_t guess(const float *a, const float *b, int64_t n, int64_t k)
{
    if (n < 4 * SAMPLE || k > n / 4) {
        return 0;
    }
    float sample[SAMPLE];
    /* Steps of the golden ratio: even, and in no rhythm with rows or channels. */
    const int64_t num_starts = n - RUN + 1;
    const int64_t step = (int64_t)((double)n * 0.6180339887498949) | 1;
    int64_t place = 0;
    for (int32_t i = 0; i < SAMPLE; i += RUN) {
        for (int32_t j = 0; j < RUN; j++) {
            sample[i + j] = b ? a[place + j] + b[place + j] : a[place + j];
        }
        place += step;
        place -= place >= num_starts ? num_starts : 0;
    }
    /* Four standard deviations beyond the expected rank, by Newton's method for the root. */
    const double expected = (double)k / (double)n * SAMPLE;
    double root = 64;
    for (int32_t i = 0; i < 12; i++) {
        root = 0.5 * (root + expected / root);
    }
    return find_cut(sample, SAMPLE, (int64_t)(expected + 4 * root) + 8).magnitude;
}

/* Room for `more` candidates; without it the guess was far off, and none are looked for any more. */
static int has_room(candidates *c, int64_t more)
{
    if (c->found + more > c->room) {
        c->floor = NONE;
        c->found = 0;
        return 0;
    }
    return 1;
}

static void scan(const float *restrict a, const float *restrict b, int64_t begin, int64_t end, float *restrict sum,
                 candidates *restrict c)
{
    for (int64_t first = begin; first < end; first += CHUNK) {
        const int64_t count = end - first < CHUNK ? end - first : CHUNK;
        const float *x = a + first;
        uint32_t largest = 0;
        for (int64_t i = 0; i < count; i++) {
            const float s = b ? x[i] + b[first + i] : x[i];
            const uint32_t magnitude = efc_magnitude(s);
            if (sum) {
                sum[first + i] = s;
            }
            largest = magnitude > largest ? magnitude : largest;
        }
        if (largest < c->floor || !has_room(c, CHUNK)) {
            continue;
        }
        x = sum ? sum + first : x;
        for (int64_t i = 0; i < count; i++) {
            c->places[c->found] = first + i;
            c->values[c->found] = x[i];
            c->found += efc_magnitude(x[i]) >= c->floor;
        }
    }
}

#if defined(__AVX2__)
#define WIDE 64 /* elements whose tests make one word */

/* As scan, with b and sum. The sum goes past the caches: nobody reads it before the next step, and a cache line that is
   written whole this way is not read before. */
static void scan_wide(const float *restrict a, const float *restrict b, int64_t n, float *restrict sum,
                      candidates *restrict c)
{
    int64_t begin = (int64_t)((0 - (uintptr_t)sum) / sizeof(float) % 8); /* streams start at multiples of 32 bytes */
    begin = begin < n ? begin : n;
    scan(a, b, 0, begin, sum, c);
    const __m256i magnitude_bits = _mm256_set1_epi32((int32_t)NONE);
    for (; begin + WIDE <= n; begin += WIDE) {
        __m256 s[8];
        uint64_t hits = 0;
        const __m256i below = _mm256_set1_epi32((int32_t)(c->floor - (c->floor < NONE)));
        for (int32_t i = 0; i < 8; i++) {
            const int64_t at = begin + 8 * i;
            s[i] = _mm256_add_ps(_mm256_loadu_ps(a + at), _mm256_loadu_ps(b + at));
            _mm256_stream_ps(sum + at, s[i]);
            const __m256i magnitude = _mm256_and_si256(_mm256_castps_si256(s[i]), magnitude_bits);
            const int32_t hit = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(magnitude, below)));
            hits |= (uint64_t)(uint32_t)hit << (8 * i);
        }
        if (!hits || !has_room(c, WIDE)) {
            continue;
        }
        float x[WIDE];
        for (int32_t i = 0; i < 8; i++) {
            _mm256_storeu_ps(x + 8 * i, s[i]);
        }
        for (; hits; hits &= hits - 1) {
            const int32_t i = efc_lowest_bit(hits);
            c->places[c->found] = begin + i;
            c->values[c->found] = x[i];
            c->found++;
        }
    }
    _mm_sfence();
    scan(a, b, begin, n, sum, c);
}
#else
static void scan_wide(const float *restrict a, const float *restrict b, int64_t n, float *restrict sum,
                      candidates *restrict c)
{
    scan(a, b, 0, n, sum, c);
}
#endif

int32_t efc_top_k_f32(const float *restrict a, const float *restrict b, int64_t n, int64_t k, float *restrict sum,
                      int64_t *restrict places, float *restrict values, int64_t room)
{
    const uint32_t floor = guess(a, b, n, k);
    candidates c = {places, values, room, 0, floor ? floor : NONE};
    if (b) {
        scan_wide(a, b, n, sum, &c);
    } else {
        scan(a, b, 0, n, sum, &c);
    }
    const int one_pass = c.found >= k;
    const float *v = one_pass ? values : sum ? sum : a;
    const int64_t num_candidates = one_pass ? c.found : n;
    cut last = find_cut(v, num_candidates, k);
    uint32_t largest = 0;
    int64_t num_sent = 0;
    for (int64_t i = 0; i < num_candidates && num_sent < k; i++) {
        const float value = v[i];
        const uint32_t magnitude = efc_magnitude(value);
        if (magnitude > last.magnitude || (magnitude == last.magnitude && last.num_ties-- > 0)) {
            places[num_sent] = one_pass ? places[i] : i;
            values[num_sent] = value;
            largest = magnitude > largest ? magnitude : largest;
            num_sent++;
        }
    }
    /* inf and NaN are larger than every number: if there are any, they are among the k. */
    return largest >= EFC_INFINITY ? EFC_NON_FINITE : EFC_OK;
}

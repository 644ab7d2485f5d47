#include "efc.h"

#define CHUNK 16     /* elements tested at once for a candidate */
#define SAMPLE 16384 /* elements that guess the threshold */

/** The k-th largest magnitude, and how many of exactly that magnitude belong to the k largest. */
typedef struct {
    uint32_t magnitude;
    int64_t num_ties;
} cut;

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
    const uint64_t step = (uint64_t)((double)n * 0.6180339887498949) | 1u;
    uint64_t place = 0;
    for (int32_t i = 0; i < SAMPLE; i++) {
        sample[i] = b ? a[place] + b[place] : a[place];
        place += step;
        place -= place >= (uint64_t)n ? (uint64_t)n : 0;
    }
    /* Four standard deviations beyond the expected rank, by Newton's method for the root. */
    const double expected = (double)k / (double)n * SAMPLE;
    double root = 64;
    for (int32_t i = 0; i < 12; i++) {
        root = 0.5 * (root + expected / root);
    }
    return find_cut(sample, SAMPLE, (int64_t)(expected + 4 * root) + 8).magnitude;
}

int32_t efc_top_k_f32(const float *restrict a, const float *restrict b, int64_t n, int64_t k, float *restrict sum,
                      int64_t *restrict places, float *restrict values, int64_t room)
{
    uint32_t floor = guess(a, b, n, k);
    const int guessed = floor > 0;
    int64_t found = 0;
    floor = guessed ? floor : UINT32_MAX;
    for (int64_t first = 0; first < n; first += CHUNK) {
        const int64_t count = n - first < CHUNK ? n - first : CHUNK;
        const float *x = a + first;
        uint32_t largest = 0;
        if (b && count == CHUNK) { /* the same loop as below, its length known to the compiler */
            for (int64_t i = 0; i < CHUNK; i++) {
                const float s = x[i] + b[first + i];
                const uint32_t magnitude = efc_magnitude(s);
                sum[first + i] = s;
                largest = magnitude > largest ? magnitude : largest;
            }
        } else {
            for (int64_t i = 0; i < count; i++) {
                const float s = b ? x[i] + b[first + i] : x[i];
                const uint32_t magnitude = efc_magnitude(s);
                if (sum) {
                    sum[first + i] = s;
                }
                largest = magnitude > largest ? magnitude : largest;
            }
        }
        if (largest < floor) {
            continue;
        }
        if (found + CHUNK > room) {
            floor = UINT32_MAX; /* The guess was far off. Only the sum goes on. */
            found = 0;
            continue;
        }
        x = sum ? sum + first : x;
        for (int64_t i = 0; i < count; i++) {
            places[found] = first + i;
            values[found] = x[i];
            found += efc_magnitude(x[i]) >= floor;
        }
    }
    const int one_pass = guessed && found >= k;
    const float *v = one_pass ? values : sum ? sum : a;
    const int64_t num_candidates = one_pass ? found : n;
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

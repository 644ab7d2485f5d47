#include "efc.h"

int64_t efc_merge_f32(const int64_t *restrict places_a, const float *restrict values_a, int64_t k_a,
                      const int64_t *restrict places_b, const float *restrict values_b, int64_t k_b, float weight,
                      int64_t *restrict places, float *restrict values)
{
    int64_t a = 0;
    int64_t b = 0;
    int64_t k = 0;
    /* Which of two comes first is anybody's guess, so nothing jumps on it. */
    while (a < k_a && b < k_b) {
        const int64_t at_a = places_a[a];
        const int64_t at_b = places_b[b];
        const int has_a = at_a <= at_b;
        const int has_b = at_b <= at_a;
        const float of_b = weight * values_b[b];
        const float both = values_a[a] + of_b;
        places[k] = has_a ? at_a : at_b;
        values[k] = has_a & has_b ? both : has_a ? values_a[a] : of_b;
        a += has_a;
        b += has_b;
        k++;
    }
    for (; a < k_a; a++, k++) {
        places[k] = places_a[a];
        values[k] = values_a[a];
    }
    for (; b < k_b; b++, k++) {
        places[k] = places_b[b];
        values[k] = weight * values_b[b];
    }
    return k;
}

#include "efc.h"

void efc_add_f64(const float *restrict a, int64_t n, double weight, double *restrict out)
{
    for (int64_t i = 0; i < n; i++) {
        out[i] += weight * (double)a[i];
    }
}

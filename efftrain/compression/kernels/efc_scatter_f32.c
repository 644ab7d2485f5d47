#include "efc.h"

void efc_scatter_f32(const int64_t *restrict places, const float *restrict values, int64_t k, float *restrict out)
{
    for (int64_t i = 0; i < k; i++) {
        if (i + EFC_AHEAD < k) {
            efc_will_write(out + places[i + EFC_AHEAD]);
        }
        out[places[i]] = values[i];
    }
}

#include "eft_internal.h"

void eft_table_s8(const int8_t *x, const int8_t *table, int32_t count, int8_t *y)
{
    for (int32_t i = 0; i < count; i++) {
        y[i] = table[x[i] + 128];
    }
}

#include "eft_internal.h"

int32_t eft_argmax_s16(const int16_t *logits, int32_t num_classes)
{
    int32_t best = 0;
    for (int32_t k = 1; k < num_classes; k++) {
        if (logits[k] > logits[best]) {
            best = k;
        }
    }
    return best;
}

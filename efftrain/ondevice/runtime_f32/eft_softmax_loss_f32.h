#ifndef EFT_SOFTMAX_LOSS_F32_H
#define EFT_SOFTMAX_LOSS_F32_H

#include "eft_f32.h"

/**
 * Softmax cross-entropy of a batch and its gradient.
 *
 * @param[in]  logits   [batch][next], of which classes count
 * @param[in]  target   [batch], in [0, classes)
 * @param[in]  scale    What each sample's gradient is multiplied by: 1 / batch for the mean
 * @param[out] g        As logits; NULL if only the loss is wanted
 * @param[out] right    Samples whose largest logit, the first of equals, is the target's are added to it
 * @return              Sum of the losses
 */
EFT_KERNEL double eft_softmax_loss_f32(const float *logits, int32_t next, int32_t classes, const int32_t *target,
                                       int32_t batch, float scale, float *g, int64_t *right)
{
    double loss = 0.0;
    for (int32_t b = 0; b < batch; b++) {
        const float *row = logits + b * next;
        int32_t best = 0;
        float sum = 0.0F;
        for (int32_t o = 1; o < classes; o++) {
            best = row[o] > row[best] ? o : best;
        }
        for (int32_t o = 0; o < classes; o++) {
            sum += expf(row[o] - row[best]);
        }
        for (int32_t o = 0; g && o < classes; o++) {
            const float share = expf(row[o] - row[best]) / sum;
            g[b * next + o] = scale * (o == target[b] ? share - 1.0F : share);
        }
        loss += (double)(logf(sum) + row[best] - row[target[b]]);
        *right += best == target[b] ? 1 : 0;
    }
    return loss;
}

#endif

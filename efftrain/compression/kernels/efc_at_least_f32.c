#include "efc.h"

#define CHUNK 16 /* elements tested at once */

int64_t efc_at_least_f32(const float *restrict x, int64_t n, float threshold, int64_t *restrict places, int64_t room)
{
    const uint32_t floor = efc_magnitude(threshold);
    int64_t found = 0;
    for (int64_t first = 0; first < n; first += CHUNK) {
        const int64_t count = n - first < CHUNK ? n - first : CHUNK;
        uint32_t largest = 0;
        for (int64_t i = 0; i < count; i++) {
            const uint32_t magnitude = efc_magnitude(x[first + i]);
            largest = magnitude > largest ? magnitude : largest;
        }
        if (largest < floor) {
            continue;
        }
        for (int64_t i = 0; i < count; i++) {
            if (efc_magnitude(x[first + i]) >= floor) {
                if (found == room) {
                    return room + 1;
                }
                places[found++] = first + i;
            }
        }
    }
    return found;
}

#include "efc.h"

void efc_pack_3_u8(const uint8_t *restrict digits, int64_t n, uint8_t *restrict packed)
{
    const int64_t whole = n / 5;
    for (int64_t i = 0; i < whole; i++) {
        const uint8_t *d = digits + 5 * i;
        packed[i] = (uint8_t)(d[0] + 3u * d[1] + 9u * d[2] + 27u * d[3] + 81u * d[4]);
    }
    if (5 * whole < n) {
        uint32_t byte = 0;
        for (int64_t i = n; i-- > 5 * whole;) {
            byte = 3 * byte + digits[i];
        }
        packed[whole] = (uint8_t)byte;
    }
}

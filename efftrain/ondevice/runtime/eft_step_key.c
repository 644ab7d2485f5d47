#include "eft_internal.h"

uint32_t eft_step_key(uint32_t seed, uint32_t step)
{
    return eft_hash32(seed + step * 0x9E3779B9U);
}

/* What runs before main on a bare Cortex-M or RV32. The vector table is the shortest that is valid, and a RISC-V begins at
 * the start of flash without one, with interrupts off; another system has its own start, so that there this file is empty. */
#include <stdint.h>

#if (defined(__arm__) || (defined(__riscv) && __riscv_xlen == 32)) && !defined(__linux__)

extern uint32_t _stack_top;
extern uint8_t _bss_start[], _bss_end[];
int main(void);
void Reset_Handler(void);

static void stop(void)
{
    for (;;) {
        __asm volatile("" ::: "memory");
    }
}

void Reset_Handler(void)
{
    for (volatile uint8_t *at = _bss_start; at != _bss_end; at++) {
        *at = 0;
    }
    (void)main();
    stop();
}

#if defined(__arm__)
__attribute__((section(".vectors"), used)) const void *const vectors[16] = {
    &_stack_top, (const void *)Reset_Handler, (const void *)stop, (const void *)stop,
    (const void *)stop, (const void *)stop, (const void *)stop, 0,
    0, 0, 0, (const void *)stop,
    (const void *)stop, 0, (const void *)stop, (const void *)stop};
#else
void reset(void);

__attribute__((section(".vectors"), used, naked)) void reset(void)
{
    __asm volatile("la sp, _stack_top\n\tj Reset_Handler");
}
#endif

/* A compiler may make these calls of plain loops and copies, even in freestanding code. */
void *memcpy(void *to, const void *from, unsigned int count);
void *memset(void *to, int value, unsigned int count);

void *memcpy(void *to, const void *from, unsigned int count)
{
    volatile uint8_t *target = (volatile uint8_t *)to;
    const uint8_t *source = (const uint8_t *)from;
    for (unsigned int i = 0; i < count; i++) {
        target[i] = source[i];
    }
    return to;
}

void *memset(void *to, int value, unsigned int count)
{
    volatile uint8_t *target = (volatile uint8_t *)to;
    for (unsigned int i = 0; i < count; i++) {
        target[i] = (uint8_t)value;
    }
    return to;
}

#endif

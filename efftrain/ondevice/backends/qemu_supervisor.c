/*
 * Runs firmware for backends/qemu.py: privileged, in memory of its own, beside the firmware, which runs unprivileged and, by the
 * MPU, sees its flash, its RAM and the sample window and nothing else. It reads a job from the host and writes what came of it.
 */
#include <stdint.h>

#define SAMPLES ((uint8_t *)$data_origin)
#define BACK $back_address /* Where firmware functions return to: nothing that they may execute, so that the MPU tells us */
#define REGISTER(address) (*(volatile uint32_t *)(address))
#define UNTOUCHED 0xDEADBEEFU

typedef struct {
    uint32_t init, load_state, set_lr_shift, train_step, predict; /* Entry points */
    uint32_t state, state_bytes;                                  /* The trained state in the firmware's RAM */
    uint32_t stack_bottom, stack_top;
    uint32_t num_regions; /* Of the MPU: base and attributes each */
    uint32_t regions[16];
    uint32_t seed, lr_shift, has_state, num_samples, sample_bytes;
} job_header;

typedef struct {
    uint32_t status; /* 0, or 1 for a fault, or 2 for one while registers were saved on the stack */
    uint32_t pc, address, cause;
    int32_t result;
} outcome;

extern uint32_t supervisor_stack_top;
int main(void);
void reset_handler(void);
void fault_handler(void);
void svc_handler(void);
void finish(uint32_t *frame);

static job_header job;
static outcome last;
extern uint32_t psp_start;
uint32_t psp_start;

static int32_t host_call(int32_t operation, const void *argument)
{
    register int32_t r0 __asm("r0") = operation;
    register const void *r1 __asm("r1") = argument;
    __asm volatile("bkpt 0xAB" : "+r"(r0) : "r"(r1) : "memory");
    return r0;
}

static uint32_t open_file(const char *name, uint32_t length, uint32_t mode)
{
    const uint32_t argument[3] = {(uint32_t)name, mode, length};
    return (uint32_t)host_call(1, argument);
}

static void transfer(int32_t operation, uint32_t file, void *data, uint32_t num_bytes)
{
    const uint32_t argument[3] = {file, (uint32_t)data, num_bytes};
    (void)host_call(operation, argument);
}

static void leave(uint32_t code)
{
    const uint32_t argument[2] = {0x20026U, code};
    (void)host_call(0x20, argument);
    for (;;) {
    }
}

/* From the frame that an exception left on the firmware's stack. */
void finish(uint32_t *frame)
{
    last.cause = REGISTER(0xE000ED28);
    last.address = (last.cause & 0x80U) != 0U ? REGISTER(0xE000ED34) : (last.cause & 0x8000U) != 0U ? REGISTER(0xE000ED38) : 0U;
    REGISTER(0xE000ED28) = last.cause;
    if ((last.cause & 0x1010U) != 0U) {
        last.status = 2;
        return;
    }
    last.pc = frame[6];
    last.result = (int32_t)frame[0];
    last.status = last.pc == BACK ? 0 : 1;
}

/* The firmware starts with the frame at psp_start, without privilege. What main had in its registers waits on our own stack. */
__attribute__((naked)) void svc_handler(void)
{
    __asm volatile("push {r4-r11}\n\t"
                   "ldr r0, =psp_start\n\t"
                   "ldr r0, [r0]\n\t"
                   "msr psp, r0\n\t"
                   "movs r1, #3\n\t"
                   "msr control, r1\n\t"
                   "isb\n\t"
                   "ldr lr, =0xFFFFFFFD\n\t"
                   "bx lr");
}

__attribute__((naked)) void fault_handler(void)
{
    __asm volatile("mrs r0, psp\n\t"
                   "bl finish\n\t"
                   "movs r1, #0\n\t"
                   "msr control, r1\n\t"
                   "isb\n\t"
                   "pop {r4-r11}\n\t"
                   "ldr lr, =0xFFFFFFF9\n\t"
                   "bx lr");
}

/* Call a function of the firmware; 0 if it returned. */
static uint32_t call(uint32_t entry, uint32_t a, uint32_t b)
{
    uint32_t *const frame = (uint32_t *)job.stack_top - 8;
    frame[0] = a;
    frame[1] = b;
    frame[2] = 0;
    frame[3] = 0;
    frame[4] = 0;
    frame[5] = BACK | 1U;
    frame[6] = entry & ~1U;
    frame[7] = 0x01000000U;
    psp_start = (uint32_t)frame;
    last.status = 3;
    __asm volatile("dsb\n\tisb\n\tsvc 0" ::: "memory", "r0", "r1", "r2", "r3", "r12", "lr", "cc");
    return last.status;
}

/* The timer counts down once in 40 instructions. */
static uint32_t ticks(void)
{
    return 0xFFFFFFFFU - REGISTER(0x40000004);
}

static uint32_t touched_stack(void)
{
    const uint32_t *at = (const uint32_t *)job.stack_bottom;
    while (at < (const uint32_t *)job.stack_top && *at == UNTOUCHED) {
        at++;
    }
    return job.stack_top - (uint32_t)at;
}

static uint32_t run(uint32_t in, uint32_t out)
{
    if (call(job.init, job.seed, 0) != 0U) {
        return 0;
    }
    if (job.has_state != 0U) {
        transfer(6, in, SAMPLES, job.state_bytes);
        if (call(job.load_state, (uint32_t)SAMPLES, job.state_bytes) != 0U || last.result < 0) {
            return 0;
        }
    }
    if (call(job.set_lr_shift, job.lr_shift, 0) != 0U) {
        return 0;
    }
    for (uint32_t n = 0; n < job.num_samples; n++) {
        int32_t label;
        transfer(6, in, &label, 4);
        transfer(6, in, SAMPLES, job.sample_bytes);
        const uint32_t start = ticks();
        const uint32_t failed = call(label < 0 ? job.predict : job.train_step, (uint32_t)SAMPLES, (uint32_t)label);
        uint32_t record[2] = {0, ticks() - start};
        if (failed != 0U || last.result < 0) {
            return n;
        }
        record[0] = (uint32_t)last.result;
        transfer(5, out, record, 8);
    }
    return job.num_samples;
}

int main(void)
{
    const uint32_t in = open_file("job.bin", 7, 1);
    const uint32_t out = open_file("records.bin", 11, 5);
    const uint32_t end = open_file("end.bin", 7, 5);
    transfer(6, in, &job, sizeof job);
    for (uint32_t n = 0; n < job.num_regions; n++) {
        REGISTER(0xE000ED98) = n;
        REGISTER(0xE000ED9C) = job.regions[2U * n];
        REGISTER(0xE000EDA0) = job.regions[2U * n + 1U];
    }
    REGISTER(0xE000ED94) = 5;       /* MPU on; for us, and only for us, the default map behind it */
    REGISTER(0xE000ED24) |= 7U << 16; /* Faults of their own, not a hard fault */
    for (uint32_t *at = (uint32_t *)job.stack_bottom; at < (uint32_t *)job.stack_top; at++) {
        *at = UNTOUCHED;
    }
    REGISTER(0x40000000) = 0;
    REGISTER(0x40000008) = 0xFFFFFFFFU;
    REGISTER(0x40000004) = 0xFFFFFFFFU;
    REGISTER(0x40000000) = 1;
    uint32_t totals[2] = {0, 0};
    totals[0] = run(in, out);
    totals[1] = touched_stack();
    transfer(5, end, &last, sizeof last);
    transfer(5, end, totals, sizeof totals);
    transfer(5, end, (void *)job.state, job.state_bytes);
    leave(0);
    return 0;
}

void reset_handler(void)
{
    (void)main();
}

__attribute__((section(".vectors"), used)) const void *const vectors[16] = {
    &supervisor_stack_top, (const void *)reset_handler, (const void *)fault_handler, (const void *)fault_handler,
    (const void *)fault_handler, (const void *)fault_handler, (const void *)fault_handler, 0,
    0, 0, 0, (const void *)svc_handler,
    (const void *)fault_handler, 0, (const void *)fault_handler, (const void *)fault_handler};

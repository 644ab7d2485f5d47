/* The entry points that an emulator or a debugger calls. The context is the only data of the whole firmware. */
#include "$name.h"

#define BOARD_ENTRY __attribute__((section(".board"), used))

${name}_context board_context;

int main(void);
int32_t board_init(uint32_t seed);
int32_t board_train(const int8_t *samples, const int32_t *labels, int32_t count);
int32_t board_evaluate(const int8_t *samples, const int32_t *labels, int32_t count);
int32_t board_train_step(const int8_t *sample, int32_t label);
int32_t board_predict(const int8_t *sample);
int32_t board_set_lr_shift(int32_t lr_shift);
int32_t board_load_state(const uint8_t *state, uint32_t num_bytes);

BOARD_ENTRY int32_t board_init(uint32_t seed)
{
    return ${name}_init(&board_context, seed);
}

/* Train on count samples in turn; how many were predicted right before their step, or the first error. */
BOARD_ENTRY int32_t board_train(const int8_t *samples, const int32_t *labels, int32_t count)
{
    int32_t right = 0;
    for (int32_t i = 0; i < count; i++) {
        const int32_t result =
            ${name}_train_step(&board_context, samples + i * (int32_t)${NAME}_INPUT_BYTES, ${NAME}_INPUT_BYTES, labels[i]);
        if (result < 0) {
            return result;
        }
        right += result == labels[i] ? 1 : 0;
    }
    return right;
}

/* How many of count samples are predicted right, or the first error. */
BOARD_ENTRY int32_t board_evaluate(const int8_t *samples, const int32_t *labels, int32_t count)
{
    int32_t right = 0;
    for (int32_t i = 0; i < count; i++) {
        const int32_t result =
            ${name}_predict(&board_context, samples + i * (int32_t)${NAME}_INPUT_BYTES, ${NAME}_INPUT_BYTES);
        if (result < 0) {
            return result;
        }
        right += result == labels[i] ? 1 : 0;
    }
    return right;
}

BOARD_ENTRY int32_t board_train_step(const int8_t *sample, int32_t label)
{
    return ${name}_train_step(&board_context, sample, ${NAME}_INPUT_BYTES, label);
}

BOARD_ENTRY int32_t board_predict(const int8_t *sample)
{
    return ${name}_predict(&board_context, sample, ${NAME}_INPUT_BYTES);
}

BOARD_ENTRY int32_t board_set_lr_shift(int32_t lr_shift)
{
    return ${name}_set_lr_shift(&board_context, lr_shift);
}

BOARD_ENTRY int32_t board_load_state(const uint8_t *state, uint32_t num_bytes)
{
    return ${name}_load_state(&board_context, state, num_bytes);
}

int main(void)
{
    return (int)board_init(0U);
}

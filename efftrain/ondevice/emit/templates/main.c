/* An example to start from: it learns when a label is known and predicts when none is. */
#include "$name.h"

static ${name}_context model; /* All RAM of the model; zero at start */

/* REPLACE: fill one input, ${NAME}_INPUT_BYTES values; this stub reads zeros. */
static void read_sensor(int8_t *to)
{
    for (uint32_t i = 0; i < ${NAME}_INPUT_BYTES; i++) {
        to[i] = 0;
    }
}

/* REPLACE: the class of this input, or -1 if nobody told; this stub never knows, but the compiler must not see
 * that, or it would leave the training step out. */
static int32_t read_label(void)
{
    const volatile int32_t unknown = -1;
    return unknown;
}

int main(void)
{
    int32_t result = ${name}_init(&model, 1u);
    while (result >= 0) {
        int8_t *const x = ${name}_input(&model); /* In place: passing it on copies nothing */
        read_sensor(x);
        const int32_t label = read_label();
        result = label >= 0 ? ${name}_train_step(&model, x, ${NAME}_INPUT_BYTES, label)
                            : ${name}_predict(&model, x, ${NAME}_INPUT_BYTES);
    }
    return 1;
}

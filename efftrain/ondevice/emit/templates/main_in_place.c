/* An example to start from: it learns when a label is known and predicts when none is. */
#include "$name.h"

static ${name}_context model; /* All RAM of the model; zero at start */

static const int8_t zeros[${NAME}_INPUT_BYTES];

/* REPLACE: where one input lies, ${NAME}_INPUT_BYTES values in flash or in memory that does not change; here they are zeros. */
static const int8_t *read_sensor(void)
{
    return zeros;
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
        const int8_t *const x = read_sensor();
        const int32_t label = read_label();
        result = label >= 0 ? ${name}_train_step(&model, x, ${NAME}_INPUT_BYTES, label)
                            : ${name}_predict(&model, x, ${NAME}_INPUT_BYTES);
    }
    return 1;
}

/* How to use $name. Replace read_sensor and read_label by what the product has. */
#include "$name.h"

int8_t *read_sensor(int8_t *to);
int32_t read_label(void);

static ${name}_context model;

int main(void)
{
    int8_t *const x = ${name}_input(&model);
    if (${name}_init(&model, 1u) != EFT_OK) {
        return 1;
    }
    for (;;) {
        const int32_t label = read_label(); /* -1: nobody told */
        const int8_t *const sample = read_sensor(x);
        const int32_t result = label >= 0 ? ${name}_train_step(&model, sample, ${NAME}_INPUT_BYTES, label)
                                          : ${name}_predict(&model, sample, ${NAME}_INPUT_BYTES);
        if (result < 0) {
            return 2;
        }
    }
}

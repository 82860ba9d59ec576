/* How often a library was asked for what is not known: scratch that a real one would take is guessed, or missing. */
#include "virtual_gpu.h"

static size_t counts[ESTIMATES];

void count_estimate(enum estimate kind) { __atomic_add_fetch(&counts[kind], 1, __ATOMIC_RELAXED); }

/* For Python, which has the names by these numbers. */
EXPORT size_t bigvivit_virtual_gpu_estimates(int kind) {
    return kind >= 0 && kind < ESTIMATES ? __atomic_load_n(&counts[kind], __ATOMIC_RELAXED) : 0;
}

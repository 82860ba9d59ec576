/* Conditions over known values are computed: whether an attention mask pads decides which kernel runs.
 *
 * Understood by name: comparison of integers and booleans with a number, casts to boolean, not, and, or, and whether all
 * or any of a whole tensor holds; operands in one piece, and known whole (values.c). What is not understood is unknown.
 */
#include "virtual_gpu.h"
#include <stdlib.h>
#include <string.h>

static int contains(const char *name, const char *part) { return strstr(name, part) != NULL; }

enum kernel_kind kind_of_condition(const char *name) {
    int elementwise = contains(name, "vectorized_elementwise_kernel");
    if (elementwise && contains(name, "CompareEqFunctorI") && contains(name, "UnaryFunctorI")) return COMPARES;
    if (contains(name, "unrolled_elementwise_kernel") && contains(name, "direct_copy_kernel_cuda") &&
        contains(name, "EUlbE_") && contains(name, "LoadWithCast"))
        return CASTS_TO_BOOLEAN;
    if (elementwise && contains(name, "_not_kernel_cuda") && contains(name, "EUlbE_")) return NEGATES;
    if (elementwise && contains(name, "BitwiseAndFunctorIbE")) return BOTH;
    if (elementwise && contains(name, "BitwiseOrFunctorIbE")) return EITHER;
    if (contains(name, "reduce_kernel") && contains(name, "func_wrapper_tIb")) {
        if (contains(name, "and_kernel_cuda")) return ALL;
        if (contains(name, "or_kernel_cuda")) return ANY;
    }
    return OTHER;
}

/* Values that are known from the first to the last, else NULL; the caller frees them. */
static char *known_whole(uint64_t address, size_t size) {
    char *bytes = size && size <= LARGEST_VALUES ? malloc(size) : NULL;
    if (bytes && get_values(address, bytes, size) == (int64_t)size) return bytes;
    free(bytes);
    return NULL;
}

static void put(uint64_t address, char *result, size_t count) {
    if (result) set_values(address, result, count);
    else forget_values(address, count);
    free(result);
}

/* (count, {int operator; T number}, {output, input}) */
static void compare(const char *name, void **arguments) {
    const char type = strstr(name, "CompareEqFunctorI")[strlen("CompareEqFunctorI")];
    size_t size = type == 'l' ? 8 : type == 'i' ? 4 : type == 'b' || type == 'h' ? 1 : 0;
    size_t count = (size_t)*(int *)arguments[0], offset = size > 4 ? size : 4;
    const uint64_t *pointers = arguments[2];
    const char *functor = arguments[1];
    char *input = size ? known_whole(pointers[1], count * size) : NULL, *result = input ? malloc(count) : NULL;
    for (size_t i = 0; result && i < count; i++) {
        int same = !memcmp(input + i * size, functor + offset, size);
        result[i] = (char)(*(const int *)functor == 0 ? same : !same);
    }
    put(pointers[0], result, count);
    free(input);
}

/* (count, function, {output, input}, offsets, offsets, {input's type, its size}, {output's type, its size}) */
static void cast(void **arguments) {
    enum { BYTE = 0, CHAR = 1, SHORT = 2, INT = 3, LONG = 4, BOOLEAN = 11 };
    static const size_t sizes[] = {[BYTE] = 1, [CHAR] = 1, [SHORT] = 2, [INT] = 4, [LONG] = 8};
    size_t count = (size_t)*(int *)arguments[0];
    const uint64_t *pointers = arguments[2];
    signed char from = *(signed char *)arguments[5], to = *(signed char *)arguments[6];
    size_t size = from >= BYTE && from <= LONG && to == BOOLEAN ? sizes[from] : 0;
    char *input = size ? known_whole(pointers[1], count * size) : NULL, *result = input ? malloc(count) : NULL;
    static const char zero[8];
    for (size_t i = 0; result && i < count; i++) result[i] = memcmp(input + i * size, zero, size) != 0;
    put(pointers[0], result, count);
    free(input);
}

/* (count, function, {output, one input or two}) */
static void combine(enum kernel_kind kind, void **arguments) {
    size_t count = (size_t)*(int *)arguments[0];
    const uint64_t *pointers = arguments[2];
    char *first = known_whole(pointers[1], count);
    char *second = kind == NEGATES ? NULL : known_whole(pointers[2], count);
    char *result = first && (second || kind == NEGATES) ? malloc(count) : NULL;
    for (size_t i = 0; result && i < count; i++)
        result[i] = kind == NEGATES ? !first[i] : kind == BOTH ? first[i] && second[i] : first[i] || second[i];
    put(pointers[0], result, count);
    free(first);
    free(second);
}

/* ReduceOp of aten/src/ATen/native/cuda/Reduce.cuh: operation and identity, a byte each; the configuration, which begins
 * with {int element size, inputs, outputs}; two calculators of offsets; input; output. As in torch 2.11 to 2.15. */
static void reduce(enum kernel_kind kind, void **arguments) {
    enum { CONFIGURATION = 4, POINTERS = 976 };
    const int *configuration = (const int *)((const char *)arguments[0] + CONFIGURATION);
    const uint64_t *pointers = (const uint64_t *)((const char *)arguments[0] + POINTERS);
    struct range from, to;
    if (configuration[0] != 1 || configuration[1] < 1 || configuration[2] != 1) return;
    if (!find_range(pointers[0], &from) || !find_range(pointers[1], &to)) return;
    size_t count = (size_t)configuration[1];
    char *input = known_whole(pointers[0], count), *result = input ? malloc(1) : NULL;
    if (result) *result = kind == ALL;
    for (size_t i = 0; result && i < count; i++) *result = kind == ALL ? *result && input[i] : *result || input[i];
    put(pointers[1], result, 1);
    free(input);
}

void compute_condition(enum kernel_kind kind, const char *name, void **arguments) {
    if (kind == COMPARES) compare(name, arguments);
    else if (kind == CASTS_TO_BOOLEAN) cast(arguments);
    else if (kind == ALL || kind == ANY) reduce(kind, arguments);
    else combine(kind, arguments);
}

/* Conditions and counts over known values are computed: whether a mask pads decides which kernel runs, sizes which
 * object arrives.
 *
 * Understood by name: (in)equality of integers and booleans with a number, and of a tensor with itself, order of two
 * tensors of 64-bit integers, casts to boolean, not, and, or, whether all or any of a whole tensor holds, additions, sums
 * and maxima of 64-bit integers; operands in one piece, and known whole (values.c). What is not understood is unknown.
 */
#include "virtual_gpu.h"
#include <stdlib.h>
#include <string.h>

enum { BYTE = 0, CHAR = 1, SHORT = 2, INT = 3, LONG = 4, BOOLEAN = 11 }; /* c10::ScalarType */

static int contains(const char *name, const char *part) { return strstr(name, part) != NULL; }

/* Kernels that go over whole tensors: their arguments begin with (int count, function, {output, inputs}). */
int goes_over_whole_tensors(const char *name) {
    return contains(name, "vectorized_elementwise_kernel") ||
           (contains(name, "unrolled_elementwise_kernel") && contains(name, "LoadWithoutCast"));
}

enum kernel_kind kind_of_condition(const char *name) {
    int elementwise = goes_over_whole_tensors(name);
    if (elementwise && contains(name, "CompareEqFunctorI") && contains(name, "UnaryFunctorI")) return COMPARES;
    if (elementwise && contains(name, "BinaryFunctorI") && contains(name, "CompareEqFunctorI")) return COMPARES_TENSORS;
    if (elementwise && contains(name, "14CompareFunctorIlE")) return ORDERS;
    if (elementwise && contains(name, "CUDAFunctorOnSelf_addIlE")) return ADDS_NUMBER;
    if (elementwise && contains(name, "CUDAFunctorOnSelf_addIiE")) return ADDS_SHORT_NUMBER;
    if (elementwise && contains(name, "CUDAFunctor_addIlE")) return ADDS;
    if (contains(name, "unrolled_elementwise_kernel") && contains(name, "direct_copy_kernel_cuda") &&
        contains(name, "LoadWithCast")) {
        if (contains(name, "EUlbE_")) return CASTS_TO_BOOLEAN;
        if (contains(name, "EUliE_") || contains(name, "EUllE_")) return CASTS_TO_INTEGER;
    }
    if (elementwise && contains(name, "_not_kernel_cuda") && contains(name, "EUlbE_")) return NEGATES;
    if (elementwise && contains(name, "BitwiseAndFunctorIbE")) return BOTH;
    if (elementwise && contains(name, "BitwiseOrFunctorIbE")) return EITHER;
    if (contains(name, "reduce_kernel") && contains(name, "func_wrapper_tIb")) {
        if (contains(name, "and_kernel_cuda")) return ALL;
        if (contains(name, "or_kernel_cuda")) return ANY;
    }
    if (contains(name, "reduce_kernel") && contains(name, "func_wrapper_tIlZNS0_11sum_functorIlllE")) return ADDS_UP;
    if (contains(name, "reduce_kernel") && contains(name, "func_wrapper_tIlNS0_13MaxNanFunctorIlE")) return FINDS_MOST;
    if (contains(name, "unrolled_elementwise_kernel") && contains(name, "BitwiseAndFunctorIlE") &&
        contains(name, "LoadWithCastILi2E"))
        return MASKS;
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

/* (count, {int operator}, {output, two inputs}): a tensor equals itself where it holds no NaN, and in a healthy run it
 * holds none. */
static void compare_tensors(void **arguments) {
    size_t count = (size_t)*(int *)arguments[0];
    const uint64_t *pointers = arguments[2];
    char *result = pointers[1] == pointers[2] && count <= LARGEST_VALUES ? malloc(count) : NULL;
    if (result) memset(result, *(int *)arguments[1] == 0, count);
    put(pointers[0], result, count);
}

/* (count, {int operator}, {output, two inputs}) */
static void order(void **arguments) {
    enum { NOT_LESS, GREATER, NOT_GREATER, LESS };
    size_t count = (size_t)*(int *)arguments[0];
    const uint64_t *pointers = arguments[2];
    int operator = *(int *)arguments[1];
    char *first = known_whole(pointers[1], 8 * count), *second = known_whole(pointers[2], 8 * count);
    char *result = first && second ? malloc(count) : NULL;
    for (size_t i = 0; result && i < count; i++) {
        int64_t a = ((int64_t *)first)[i], b = ((int64_t *)second)[i];
        result[i] = operator == NOT_LESS ? a >= b : operator == GREATER ? a > b : operator == NOT_GREATER ? a <= b : a < b;
    }
    put(pointers[0], result, count);
    free(first);
    free(second);
}

/* (count, {number, factor} or {factor}, {output, input or two}): the second times the factor is added to the first */
static void add(enum kernel_kind kind, void **arguments) {
    size_t count = (size_t)*(int *)arguments[0];
    const uint64_t *pointers = arguments[2];
    const int64_t *functor = arguments[1];
    char *first = known_whole(pointers[1], 8 * count), *second = NULL;
    if (kind == ADDS) second = known_whole(pointers[2], 8 * count);
    int known = first && (second || kind == ADDS_NUMBER);
    for (size_t i = 0; known && i < count; i++)
        ((int64_t *)first)[i] += second ? ((int64_t *)second)[i] * functor[0] : functor[0] * functor[1];
    if (known) set_values(pointers[0], first, 8 * count);
    else forget_values(pointers[0], 8 * count);
    free(first);
    free(second);
}

/* (count, {number, factor}, {output, input}), of 32 bits */
static void add_short(void **arguments) {
    size_t count = (size_t)*(int *)arguments[0];
    const uint64_t *pointers = arguments[2];
    const int32_t *functor = arguments[1];
    char *values = known_whole(pointers[1], 4 * count);
    for (size_t i = 0; values && i < count; i++) ((int32_t *)values)[i] += functor[0] * functor[1];
    put(pointers[0], values, 4 * count);
}

/* A whole tensor of integers or booleans as 64-bit integers, or NULL. */
static int64_t *known_integers(uint64_t address, int type, size_t count) {
    static const size_t sizes[BOOLEAN + 1] = {[BYTE] = 1, [CHAR] = 1, [SHORT] = 2, [INT] = 4, [LONG] = 8, [BOOLEAN] = 1};
    size_t size = type >= BYTE && type <= BOOLEAN ? sizes[type] : 0;
    char *bytes = size ? known_whole(address, count * size) : NULL;
    int64_t *integers = bytes ? malloc(count * sizeof *integers) : NULL;
    for (size_t i = 0; integers && i < count; i++) {
        if (size == 8) integers[i] = ((int64_t *)bytes)[i];
        else if (size == 4) integers[i] = ((int32_t *)bytes)[i];
        else if (size == 2) integers[i] = ((int16_t *)bytes)[i];
        else integers[i] = type == CHAR ? (signed char)bytes[i] : (unsigned char)bytes[i];
    }
    free(bytes);
    return integers;
}

/* (count, function, {output, input}, offsets, offsets, {input's type, its size}, {output's type, its size}) */
static void cast(void **arguments) {
    size_t count = (size_t)*(int *)arguments[0];
    const uint64_t *pointers = arguments[2];
    signed char from = *(signed char *)arguments[5], to = *(signed char *)arguments[6];
    size_t size = to == LONG ? 8 : to == INT ? 4 : 1;
    int64_t *input = to == LONG || to == INT || to == BOOLEAN ? known_integers(pointers[1], from, count) : NULL;
    char *result = input ? malloc(count * size) : NULL;
    for (size_t i = 0; result && i < count; i++) {
        if (to == LONG) ((int64_t *)result)[i] = input[i];
        else if (to == INT) ((int32_t *)result)[i] = (int32_t)input[i];
        else result[i] = input[i] != 0;
    }
    put(pointers[0], result, count * size);
    free(input);
}

/* (count, function, {output, two inputs}, offsets, offsets, {inputs' types}, {output's type}): the bitwise and of integers
 * and booleans. Where one is not known and the other is zero, so is the result. */
static void mask(void **arguments) {
    size_t count = (size_t)*(int *)arguments[0];
    const uint64_t *pointers = arguments[2];
    const signed char *from = arguments[5], *to = arguments[6];
    int64_t *first = known_integers(pointers[1], from[0], count), *second = known_integers(pointers[2], from[1], count);
    int64_t *known = first ? first : second, set = 0;
    for (size_t i = 0; known && i < count; i++) {
        if (first && second) first[i] &= second[i];
        set |= known[i];
    }
    if (*to == LONG && known && ((first && second) || !set)) set_values(pointers[0], known, 8 * count);
    else forget_values(pointers[0], (*to == LONG ? 8 : 1) * count);
    free(first);
    free(second);
}

/* (count, function, {output, one input or two}); a condition that decides alone does so beside one that is not known */
static void combine(enum kernel_kind kind, void **arguments) {
    size_t count = (size_t)*(int *)arguments[0];
    const uint64_t *pointers = arguments[2];
    char *first = known_whole(pointers[1], count);
    char *second = kind == NEGATES ? NULL : known_whole(pointers[2], count);
    const char *a = first ? first : second, *b = second ? second : first;
    char *result = a ? malloc(count) : NULL;
    int decided = kind == NEGATES || (first && second);
    for (size_t i = 0; result && i < count; i++)
        result[i] = kind == NEGATES ? !a[i] : kind == BOTH ? a[i] && b[i] : a[i] || b[i];
    if (result && !decided) decided = !memchr(result, kind == BOTH, count); /* all false, or all true */
    if (!decided) free(result), result = NULL;
    put(pointers[0], result, count);
    free(first);
    free(second);
}

/* ReduceOp of aten/src/ATen/native/cuda/Reduce.cuh: operation and identity; the configuration, which begins with {int
 * element size, inputs, outputs}; two calculators of offsets; input; output. As in torch 2.11 to 2.15. */
static void reduce(enum kernel_kind kind, void **arguments) {
    size_t size = kind == ADDS_UP || kind == FINDS_MOST ? 8 : 1;
    const int *configuration = (const int *)((const char *)arguments[0] + (size == 8 ? 16 : 4));
    const uint64_t *pointers = (const uint64_t *)((const char *)arguments[0] + (size == 8 ? 992 : 976));
    struct range from, to;
    if (configuration[0] != (int)size || configuration[1] < 1 || configuration[2] != 1) return;
    if (!find_range(pointers[0], &from) || !find_range(pointers[1], &to)) return;
    size_t count = (size_t)configuration[1];
    char *input = known_whole(pointers[0], count * size);
    if (!input) {
        forget_values(pointers[1], size);
        return;
    }
    int64_t sum = 0, most = INT64_MIN;
    for (size_t i = 0; i < count; i++) {
        int64_t value = size == 8 ? ((int64_t *)input)[i] : input[i] != 0;
        sum += value;
        if (value > most) most = value;
    }
    if (kind == FINDS_MOST) sum = most;
    char condition = kind == ALL ? sum == (int64_t)count : sum > 0;
    set_values(pointers[1], size == 8 ? (void *)&sum : (void *)&condition, size);
    free(input);
}

void compute_condition(enum kernel_kind kind, const char *name, void **arguments) {
    if (kind == COMPARES) compare(name, arguments);
    else if (kind == COMPARES_TENSORS) compare_tensors(arguments);
    else if (kind == ORDERS) order(arguments);
    else if (kind == ADDS || kind == ADDS_NUMBER) add(kind, arguments);
    else if (kind == MASKS) mask(arguments);
    else if (kind == CASTS_TO_BOOLEAN || kind == CASTS_TO_INTEGER) cast(arguments);
    else if (kind == ADDS_SHORT_NUMBER) add_short(arguments);
    else if (kind == ALL || kind == ANY || kind == ADDS_UP || kind == FINDS_MOST) reduce(kind, arguments);
    else combine(kind, arguments);
}

/* The few kernels whose result decides where a program goes. None is run; these are understood by their names.
 *
 * - Filling: `ones`, `full` and `zeros` read as they were filled.
 * - Concatenation along the first dimension of tensors in one piece: of what is known of them.
 * - Joining conditions (`all`, a logical or bitwise and, a product of booleans, which is how `isfinite` ends): where
 *   they are not known (conditions.c), a single boolean that is read back next is true. All others are false. So `torch.isfinite(loss).all()` is true,
 *   `torch.isnan(loss).any()` and `loss < threshold` are false: a healthy run goes on.
 * - A single byte copied on the device, unknown, is what `all` and `any` make of one element: a joined condition too.
 * - A mask that is not known and was cast to boolean right before it is copied to the host takes all elements, as a mask
 *   does on the device.
 * - Counting for `nonzero` (and indexing by a mask): exact for a mask that came from the host; for any other, all
 *   elements are taken, which is the most that it can be.
 * - Keeping one of equal keys, as sparse tensors do when they are coalesced: all are taken to differ.
 * - Distinct values, for `unique`: each element is taken to be one, found once.
 */
#include "virtual_gpu.h"
#include <stdlib.h>
#include <string.h>

static __thread enum kernel_kind last;
static __thread int counted;

static size_t size_of_scalar(const char *mangled) {
    switch (*mangled) {
    case 'b': case 'h': case 'a': return 1;
    case 's': case 't': return 2;
    case 'i': case 'j': case 'f': return 4;
    case 'l': case 'm': case 'x': case 'd': return 8;
    default: return !strncmp(mangled, "N3c104HalfE", 11) || !strncmp(mangled, "N3c108BFloat16E", 15) ? 2 : 0;
    }
}

static const char *scalar_behind(const char *name, const char *functor) {
    const char *at = strstr(name, functor);
    return at ? at + strlen(functor) : "";
}

enum kernel_kind kind_of_kernel(const char *name) {
    enum kernel_kind condition = kind_of_condition(name);
    if (condition != OTHER) return condition;
    if (goes_over_whole_tensors(name) && size_of_scalar(scalar_behind(name, "FillFunctorI"))) return FILLS;
    if (strstr(name, "CatArrayBatchedCopy") && (strstr(name, "contig") || strstr(name, "vectorized")) &&
        strstr(name, "EEjLi1ELi128ELi1E"))
        return CONCATENATES;
    if (strstr(name, "and_kernel_cuda") || strstr(name, "logical_and_kernel") || strstr(name, "MulFunctorIb"))
        return JOINS;
    if (strstr(name, "DeviceReduce") && strstr(name, "NonZeroOpI")) return COUNTS;
    if (strstr(name, "DeviceReduceSingleTileKernel")) return SUMS_UP;
    if (strstr(name, "DeviceUniqueByKeySweepKernel")) return KEEPS_ONE_OF_EQUALS;
    if (strstr(name, "DeviceSelectSweepKernel") && strstr(name, "equal_to")) return KEEPS_DISTINCT;
    if (strstr(name, "DeviceReduceByKeyKernel") && strstr(name, "3rle6encode")) return COUNTS_DISTINCT;
    return OTHER;
}

/* (int count, FillFunctor{value}, {pointer}) */
static void fill(const char *name, void **arguments) {
    size_t size = size_of_scalar(scalar_behind(name, "FillFunctorI")), count = (size_t)*(int *)arguments[0];
    uint64_t address = *(uint64_t *)arguments[2];
    char *bytes = count * size <= LARGEST_VALUES ? malloc(count * size) : NULL;
    if (!bytes) {
        forget_values(address, count * size);
        return;
    }
    for (size_t i = 0; i < count; i++) memcpy(bytes + i * size, arguments[1], size);
    set_values(address, bytes, count * size);
    free(bytes);
}

/* (output, {inputs[128], offsets[128], sizes[128], elements[128], ...}, shape, int dimension, unsigned stride), a row of
 * the grid for each input. */
static void concatenate(const char *name, void **arguments, unsigned inputs) {
    size_t size = (size_t)atoi(scalar_behind(name, "OpaqueTypeILj"));
    uint64_t output = *(uint64_t *)arguments[0];
    const uint64_t *from = arguments[1];
    const unsigned *offsets = (const unsigned *)(from + 128), *elements = offsets + 256;
    size_t stride = *(unsigned *)arguments[4];
    for (unsigned i = 0; *(int *)arguments[3] == 0 && i < inputs && i < 128; i++)
        copy_values(output + offsets[i] * stride * size, from[i], elements[i] * size);
}

/* DeviceReduceKernel and DeviceReduceSingleTileKernel(iterator{pointer}, output, int count, ...) */
static int count_nonzero(const char *name, void **arguments) {
    size_t size = size_of_scalar(scalar_behind(name, "NonZeroOpI")), count = (size_t)*(int *)arguments[2];
    char *bytes = size && count * size <= LARGEST_VALUES ? malloc(count * size) : NULL;
    int found = (int)count;
    if (bytes && get_values(*(uint64_t *)arguments[0], bytes, count * size)) {
        static const char zero[8];
        found = 0;
        for (size_t i = 0; i < count; i++) found += memcmp(bytes + i * size, zero, size) != 0;
    }
    free(bytes);
    return found;
}

/* DeviceSelectSweepKernel(input, flags, output, number, tiles, function, function, int count, ...) and, for run lengths,
 * DeviceReduceByKeyKernel(input, output, values, lengths, number, tiles, int, function, function, int count) */
static void take_as_distinct(enum kernel_kind kind, void **arguments) {
    int64_t count = *(int *)arguments[kind == COUNTS_DISTINCT ? 9 : 7];
    set_values(*(uint64_t *)arguments[kind == COUNTS_DISTINCT ? 4 : 3], &count, sizeof count);
    size_t size = (size_t)count * sizeof count;
    int64_t *ones = kind == COUNTS_DISTINCT && size <= LARGEST_VALUES ? malloc(size) : NULL;
    for (int64_t i = 0; ones && i < count; i++) ones[i] = 1;
    if (ones) set_values(*(uint64_t *)arguments[3], ones, size);
    free(ones);
}

void note_kernel(enum kernel_kind kind, const char *name, void **arguments, unsigned rows) {
    if (kind == SUMS_UP && last == COUNTS) return; /* the second half of counting */
    last = kind;
    if (kind >= COMPARES) compute_condition(kind, name, arguments);
    if (kind == FILLS) fill(name, arguments);
    if (kind == CONCATENATES) concatenate(name, arguments, rows);
    if (kind == KEEPS_DISTINCT || kind == COUNTS_DISTINCT) take_as_distinct(kind, arguments);
    if (kind == COUNTS) counted = count_nonzero(name, arguments);
    if (kind == KEEPS_ONE_OF_EQUALS) counted = *(int *)arguments[7]; /* behind four iterators, the result, state, functor */
}

void note_copy(size_t size) {
    if (size == 1 && last == OTHER) last = JOINS;
}

void read_result(void *to, size_t size) {
    if ((last == JOINS || last == BOTH || last == ALL) && size == 1) *(char *)to = 1;
    if (last == CASTS_TO_BOOLEAN && size > 1) memset(to, 1, size);
    if ((last == COUNTS || last == KEEPS_ONE_OF_EQUALS) && size == sizeof counted) memcpy(to, &counted, size);
}

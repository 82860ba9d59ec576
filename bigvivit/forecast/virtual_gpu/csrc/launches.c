/* Kernels: registered, found, launched, counted; never run.
 *
 * Answers: what nvcc's code calls before main (fat binaries, functions, variables), launches in every form, attributes
 * of functions, libraries that are loaded at run time.
 * What a launch means for values that are read back: results.c.
 */
#include "virtual_gpu.h"
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

struct dim3 {
    unsigned x, y, z;
};
struct launch_config { /* cudaLaunchConfig_t; the driver's has another layout */
    struct dim3 grid, block;
    size_t shared;
    void *stream;
    void *attributes;
    unsigned attribute_count;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static size_t launches;

/* Kernels by the address that stands for them in the host's code: a table with open addressing. */
struct kernel {
    const void *host;
    const char *name; /* mangled */
    enum kernel_kind kind;
};
static struct kernel *kernels;
static size_t kernel_count, kernel_room;

static struct kernel *place_of(struct kernel *table, size_t room, const void *host) {
    size_t at = ((uintptr_t)host >> 4) * 0x9E3779B97F4A7C15ull % room;
    while (table[at].host && table[at].host != host) at = (at + 1) % room;
    return &table[at];
}

static void remember(const void *host, const char *name) {
    pthread_mutex_lock(&lock);
    if (2 * kernel_count >= kernel_room) {
        size_t room = kernel_room ? 2 * kernel_room : 1 << 14;
        struct kernel *larger = calloc(room, sizeof *larger);
        if (!larger) abort();
        for (size_t i = 0; i < kernel_room; i++)
            if (kernels[i].host) *place_of(larger, room, kernels[i].host) = kernels[i];
        free(kernels);
        kernels = larger;
        kernel_room = room;
    }
    struct kernel *place = place_of(kernels, kernel_room, host);
    if (!place->host) kernel_count++;
    *place = (struct kernel){host, name, NOT_YET_KNOWN};
    pthread_mutex_unlock(&lock);
}

int launch(const void *function, void **arguments, unsigned rows, void *stream) {
    __atomic_add_fetch(&launches, 1, __ATOMIC_RELAXED);
    count_captured_node(stream);
    struct kernel kernel = {NULL, "", OTHER};
    pthread_mutex_lock(&lock); /* a library that is being loaded may enlarge the table */
    struct kernel *place = kernel_room ? place_of(kernels, kernel_room, function) : &kernel;
    if (place->host && place->kind == NOT_YET_KNOWN) place->kind = kind_of_kernel(place->name);
    if (place->host) kernel = *place;
    pthread_mutex_unlock(&lock);
    note_kernel(kernel.kind, kernel.name, arguments, rows);
    return SUCCESS;
}

/* For Python: how many kernels this process has launched, those of libraries that are imitated not counted. */
EXPORT size_t bigvivit_virtual_gpu_launches(void) { return launches; }

/* Between `<<<` and the launch itself, the configuration waits on a stack. */
static __thread struct launch_config waiting[16];
static __thread int waiting_count;

EXPORT unsigned __cudaPushCallConfiguration(struct dim3 grid, struct dim3 block, size_t shared, void *stream) {
    if (waiting_count == 16) unanswered("__cudaPushCallConfiguration, nested more than 16 times");
    waiting[waiting_count++] = (struct launch_config){grid, block, shared, stream, NULL, 0};
    return 0;
}
EXPORT int __cudaPopCallConfiguration(struct dim3 *grid, struct dim3 *block, size_t *shared, void **stream) {
    if (!waiting_count) return fail(INVALID_VALUE);
    struct launch_config top = waiting[--waiting_count];
    *grid = top.grid, *block = top.block, *shared = top.shared, *stream = top.stream;
    return SUCCESS;
}
EXPORT int cudaLaunchKernel(const void *f, struct dim3 grid, struct dim3 block, void **arguments, size_t shared, void *s) {
    (void)block, (void)shared;
    return launch(f, arguments, grid.y, s);
}
EXPORT int __cudaLaunchKernel(const void *f, struct dim3 grid, struct dim3 block, void **a, size_t shared, void *s) {
    return cudaLaunchKernel(f, grid, block, a, shared, s);
}
EXPORT int cudaLaunchCooperativeKernel(const void *f, struct dim3 grid, struct dim3 block, void **a, size_t shared,
                                       void *s) {
    return cudaLaunchKernel(f, grid, block, a, shared, s);
}
EXPORT int cudaLaunchKernelExC(const struct launch_config *config, const void *function, void **arguments) {
    return launch(function, arguments, config->grid.y, config->stream);
}

/* Registration */
EXPORT void **__cudaRegisterFatBinary(void *binary) {
    void **handle = malloc(sizeof *handle);
    if (!handle) abort();
    *handle = binary;
    return handle;
}
EXPORT void __cudaRegisterFatBinaryEnd(void **handle) { (void)handle; }
EXPORT void __cudaUnregisterFatBinary(void **handle) { free(handle); }
EXPORT char __cudaInitModule(void **handle) { return (void)handle, 1; }
EXPORT void __cudaRegisterFunction(void **handle, const char *host, char *device, const char *name, int threads,
                                   void *tid, void *bid, void *block, void *grid, int *warp) {
    (void)handle, (void)device, (void)threads, (void)tid, (void)bid, (void)block, (void)grid, (void)warp;
    remember(host, name);
}
EXPORT void __cudaRegisterVar(void **handle, char *host, char *device, const char *name, int external, size_t size,
                              int constant, int global) {
    (void)handle, (void)host, (void)device, (void)name, (void)external, (void)size, (void)constant, (void)global;
}
EXPORT void __cudaRegisterManagedVar(void **handle, void **host, char *device, const char *name, int external,
                                     size_t size, int constant, int global) {
    (void)handle, (void)host, (void)device, (void)name, (void)external, (void)size, (void)constant, (void)global;
}
EXPORT int __cudaGetKernel(const void **kernel, const void *function) { return *kernel = function, SUCCESS; }
EXPORT int cudaGetKernel(const void **kernel, const void *function) { return *kernel = function, SUCCESS; }
EXPORT int cudaGetFuncBySymbol(const void **function, const void *symbol) { return *function = symbol, SUCCESS; }

/* Functions */
struct function_attributes {
    size_t shared, constant, local;
    int max_threads, registers, ptx_version, binary_version, cache_mode, max_dynamic_shared, carveout;
    int cluster_must_be_set, cluster[3], cluster_policy, nonportable_cluster, reserved[16];
};
EXPORT int cudaFuncGetAttributes(struct function_attributes *to, const void *function) {
    (void)function;
    memset(to, 0, sizeof *to);
    to->max_threads = 1024;
    to->registers = 32;
    to->ptx_version = to->binary_version = card()->code;
    to->max_dynamic_shared = 49152;
    return SUCCESS;
}
EXPORT int cudaFuncSetAttribute(const void *f, int attribute, int value) {
    return (void)f, (void)attribute, (void)value, SUCCESS;
}
EXPORT int cudaFuncSetCacheConfig(const void *f, int config) { return (void)f, (void)config, SUCCESS; }
EXPORT int cudaFuncSetSharedMemConfig(const void *f, int config) { return (void)f, (void)config, SUCCESS; }
EXPORT int cudaFuncGetName(const char **name, const void *f) { return (void)f, *name = "kernel", SUCCESS; }
EXPORT int cudaKernelSetAttributeForDevice(const void *kernel, int attribute, int value, int device) {
    return (void)kernel, (void)attribute, (void)value, (void)device, SUCCESS;
}

/* Libraries that are loaded at run time: every kernel asked for is in them. */
EXPORT int cudaLibraryLoadData(void **library, const void *code, ...) { return *library = (void *)code, SUCCESS; }
EXPORT int cudaLibraryGetKernel(const void **kernel, void *library, const char *name) {
    (void)name;
    return *kernel = library, SUCCESS;
}
EXPORT int cudaLibraryUnload(void *library) { return (void)library, SUCCESS; }

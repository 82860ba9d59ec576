/* The driver's interface (libcuda.so.1), for those who go below the runtime: PyTorch's expandable segments, NVRTC's
 * and Triton's modules.
 *
 * Answers: devices, primary contexts, physical memory that is mapped into reserved addresses (counted once, however
 * often mapped), memory and copies, modules and functions of any name, launches, tensor maps, pointers' attributes.
 * Does not answer: green contexts, multicast, handles for other processes, linking, graphs, textures: by name.
 */
#include "virtual_gpu.h"
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Contexts: that of a device is its number plus one. */
EXPORT int cuInit(unsigned flags) { return (void)flags, visible_count() ? SUCCESS : NO_DEVICE; }
EXPORT int cuDriverGetVersion(int *version) { return *version = CUDA_VERSION_NUMBER, SUCCESS; }
/* NVRTC asks for tables that are not documented, and goes on without where there are none. */
EXPORT int cuGetExportTable(const void **table, const void *id) { return (void)id, *table = NULL, NOT_FOUND; }
EXPORT int cuDeviceGetCount(int *count) { return *count = visible_count(), SUCCESS; }
EXPORT int cuDeviceGet(int *device, int ordinal) {
    if (ordinal < 0 || ordinal >= visible_count()) return INVALID_DEVICE;
    return *device = ordinal, SUCCESS;
}
EXPORT int cuDeviceGetName(char *name, int length, int device) {
    (void)device;
    return snprintf(name, (size_t)length, "%s", card()->name), SUCCESS;
}
EXPORT int cuDeviceTotalMem_v2(size_t *bytes, int device) { return (void)device, *bytes = card()->memory, SUCCESS; }
EXPORT int cuDeviceComputeCapability(int *major, int *minor, int device) {
    (void)device;
    return *major = card()->capability / 10, *minor = card()->capability % 10, SUCCESS;
}
EXPORT int cuDeviceGetUuid_v2(char *uuid, int device) {
    return write_uuid(physical_device(device), uuid), SUCCESS;
}
EXPORT int cuDeviceGetUuid(char *uuid, int device) { return cuDeviceGetUuid_v2(uuid, device); }
EXPORT int cuDeviceGetPCIBusId(char *text, int length, int device) {
    extern int cudaDeviceGetPCIBusId(char *, int, int);
    return cudaDeviceGetPCIBusId(text, length, device);
}
EXPORT int cuDeviceCanAccessPeer(int *can, int from, int to) { return *can = from != to, SUCCESS; }
EXPORT int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
    if (flags) *flags = 0;
    *active = context_active(device);
    return SUCCESS;
}
EXPORT int cuDevicePrimaryCtxRetain(void **context, int device) {
    if (device < 0 || device >= visible_count()) return INVALID_DEVICE;
    touch(device);
    return *context = (void *)(uintptr_t)(device + 1), SUCCESS;
}
EXPORT int cuDevicePrimaryCtxRelease_v2(int device) { return (void)device, SUCCESS; }
EXPORT int cuDevicePrimaryCtxSetFlags_v2(int device, unsigned flags) { return (void)device, (void)flags, SUCCESS; }
EXPORT int cuCtxGetCurrent(void **context) {
    int device = current_device();
    return *context = context_active(device) ? (void *)(uintptr_t)(device + 1) : NULL, SUCCESS;
}
EXPORT int cuCtxSetCurrent(void *context) {
    extern int cudaSetDevice(int);
    return context ? cudaSetDevice((int)(uintptr_t)context - 1) : SUCCESS;
}
static __thread void *pushed[64];
static __thread int pushed_count;
EXPORT int cuCtxPushCurrent_v2(void *context) {
    if (pushed_count == 64) return INVALID_VALUE;
    cuCtxGetCurrent(&pushed[pushed_count++]);
    return cuCtxSetCurrent(context);
}
EXPORT int cuCtxPopCurrent_v2(void **context) {
    if (context) cuCtxGetCurrent(context);
    return pushed_count ? cuCtxSetCurrent(pushed[--pushed_count]) : INVALID_VALUE;
}
EXPORT int cuCtxGetDevice(int *device) { return *device = current_device(), SUCCESS; }
EXPORT int cuCtxSynchronize(void) { return SUCCESS; }
EXPORT int cuCtxGetLimit(size_t *value, int limit) { return (void)limit, *value = 1024, SUCCESS; }
EXPORT int cuCtxSetLimit(int limit, size_t value) { return (void)limit, (void)value, SUCCESS; }
EXPORT int cuCtxGetApiVersion(void *context, unsigned *version) { return (void)context, *version = 3020, SUCCESS; }
EXPORT int cuCtxGetStreamPriorityRange(int *lowest, int *greatest) { return *lowest = 0, *greatest = -5, SUCCESS; }

/* Physical memory, and addresses that it is mapped to. */
struct physical {
    int device;
    size_t size;
    int references; /* the handle and each mapping */
};
struct allocation_properties { /* CUmemAllocationProp */
    int type, handle_types, location_type, device;
    void *windows;
    unsigned char flags[8];
};
struct mapping {
    uint64_t address;
    struct physical *memory;
    struct mapping *next;
};
struct reservation {
    uint64_t address;
    int device;
    struct reservation *next;
};
static struct mapping *mappings;
static struct reservation *reservations;
static char lists; /* guards the two lists */

static void lock_lists(void) {
    while (__atomic_test_and_set(&lists, __ATOMIC_ACQUIRE)) continue;
}
static void unlock_lists(void) { __atomic_clear(&lists, __ATOMIC_RELEASE); }

static void drop(struct physical *memory) {
    if (__atomic_sub_fetch(&memory->references, 1, __ATOMIC_ACQ_REL)) return;
    discharge(memory->device, memory->size);
    free(memory);
}

EXPORT int cuMemGetAllocationGranularity(size_t *size, const struct allocation_properties *properties, int option) {
    (void)properties, (void)option;
    return *size = 2 * MIB, SUCCESS;
}
EXPORT int cuMemCreate(struct physical **handle, size_t size, const struct allocation_properties *wanted,
                       unsigned long long flags) {
    (void)flags;
    if (wanted->device < 0 || wanted->device >= visible_count()) return INVALID_DEVICE;
    if (charge(wanted->device, size) != SUCCESS) return OUT_OF_MEMORY;
    struct physical *made = calloc(1, sizeof *made);
    if (!made) abort();
    *made = (struct physical){wanted->device, size, 1};
    return *handle = made, SUCCESS;
}
EXPORT int cuMemRelease(struct physical *handle) { return drop(handle), SUCCESS; }
EXPORT int cuMemGetAllocationPropertiesFromHandle(struct allocation_properties *to, struct physical *handle) {
    *to = (struct allocation_properties){.type = 1, .location_type = 1, .device = handle->device};
    return SUCCESS;
}
EXPORT int cuMemAddressReserve(uint64_t *address, size_t size, size_t alignment, uint64_t wanted, unsigned long long f) {
    (void)alignment, (void)wanted, (void)f;
    int device = current_device();
    if (reserve_addresses(device, size, address) != SUCCESS) return OUT_OF_MEMORY;
    struct reservation *made = malloc(sizeof *made);
    if (!made) abort();
    lock_lists();
    *made = (struct reservation){*address, device, reservations};
    reservations = made;
    unlock_lists();
    return SUCCESS;
}
EXPORT int cuMemAddressFree(uint64_t address, size_t size) {
    struct reservation *found = NULL;
    lock_lists();
    for (struct reservation **at = &reservations; *at; at = &(*at)->next)
        if ((*at)->address == address) {
            found = *at;
            *at = found->next;
            break;
        }
    unlock_lists();
    if (!found) return INVALID_VALUE;
    release_addresses(found->device, address, size);
    free(found);
    return SUCCESS;
}
EXPORT int cuMemMap(uint64_t address, size_t size, size_t offset, struct physical *handle, unsigned long long flags) {
    (void)offset, (void)flags;
    struct mapping *made = malloc(sizeof *made);
    if (!made) abort();
    __atomic_add_fetch(&handle->references, 1, __ATOMIC_ACQ_REL);
    lock_lists();
    *made = (struct mapping){address, handle, mappings};
    mappings = made;
    unlock_lists();
    return add_range((struct range){address, size, 0, handle->device, DEVICE_MEMORY, 0});
}
/* PyTorch unmaps what it mapped piece by piece; a size over several pieces unmaps them all. */
EXPORT int cuMemUnmap(uint64_t address, size_t size) {
    uint64_t end = address + size;
    struct mapping *gone = NULL;
    lock_lists();
    for (struct mapping **at = &mappings; *at;) {
        struct mapping *here = *at;
        if (here->address < address || here->address >= end) {
            at = &here->next;
            continue;
        }
        *at = here->next;
        here->next = gone;
        gone = here;
    }
    unlock_lists();
    if (!gone) return INVALID_VALUE;
    while (gone) {
        struct mapping *next = gone->next;
        struct range removed;
        remove_range(gone->address, &removed);
        drop(gone->memory);
        free(gone);
        gone = next;
    }
    return SUCCESS;
}
EXPORT int cuMemSetAccess(uint64_t address, size_t size, const void *access, size_t count) {
    return (void)address, (void)size, (void)access, (void)count, SUCCESS;
}
EXPORT int cuMemRetainAllocationHandle(struct physical **handle, void *address) {
    int result = INVALID_VALUE;
    lock_lists();
    for (struct mapping *at = mappings; at && result; at = at->next)
        if (at->address <= (uint64_t)address && (uint64_t)address < at->address + at->memory->size) {
            __atomic_add_fetch(&at->memory->references, 1, __ATOMIC_ACQ_REL);
            *handle = at->memory;
            result = SUCCESS;
        }
    unlock_lists();
    return result;
}

/* Memory and copies */
EXPORT int cuMemAlloc_v2(uint64_t *address, size_t size) { return device_allocate(current_device(), size, address); }
EXPORT int cuMemFree_v2(uint64_t address) { return device_free(address); }
EXPORT int cuMemGetInfo_v2(size_t *free_bytes, size_t *total_bytes) {
    return device_memory(current_device(), free_bytes, total_bytes), SUCCESS;
}
EXPORT int cuMemGetAddressRange_v2(uint64_t *base, size_t *size, uint64_t address) {
    struct range found;
    if (!find_range(address, &found)) return NOT_FOUND;
    if (base) *base = found.address;
    if (size) *size = found.size;
    return SUCCESS;
}
extern int cudaMemcpyAsync(void *, const void *, size_t, int, void *);
EXPORT int cuMemcpyAsync(uint64_t to, uint64_t from, size_t n, void *s) {
    return cudaMemcpyAsync((void *)to, (void *)from, n, 4, s);
}
EXPORT int cuMemcpyHtoD_v2(uint64_t to, const void *from, size_t n) {
    return cudaMemcpyAsync((void *)to, from, n, 4, NULL);
}
EXPORT int cuMemcpyDtoH_v2(void *to, uint64_t from, size_t n) {
    return cudaMemcpyAsync(to, (void *)from, n, 4, NULL);
}
EXPORT int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t n, void *s) {
    return cudaMemcpyAsync((void *)to, from, n, 4, s);
}
EXPORT int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t n, void *s) {
    return cudaMemcpyAsync(to, (void *)from, n, 4, s);
}
EXPORT int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t n, void *s) {
    return cudaMemcpyAsync((void *)to, (void *)from, n, 4, s);
}
EXPORT int cuMemsetD8Async(uint64_t to, unsigned char v, size_t n, void *s) {
    return (void)to, (void)v, (void)n, count_captured_node(s), SUCCESS;
}
EXPORT int cuMemsetD32Async(uint64_t to, unsigned v, size_t n, void *s) {
    return (void)to, (void)v, (void)n, count_captured_node(s), SUCCESS;
}
EXPORT int cuMemsetD32_v2(uint64_t to, unsigned v, size_t n) { return (void)to, (void)v, (void)n, SUCCESS; }
EXPORT int cuStreamWriteValue32(void *s, uint64_t to, uint32_t v, unsigned f) {
    return (void)to, (void)v, (void)f, count_captured_node(s), SUCCESS;
}
EXPORT int cuStreamWriteValue32_v2(void *s, uint64_t to, uint32_t v, unsigned f) {
    return cuStreamWriteValue32(s, to, v, f);
}

static int pointer_attribute(void *to, int attribute, uint64_t address) {
    struct range found;
    if (!find_range(address, &found)) return INVALID_VALUE;
    switch (attribute) {
    case 1: *(void **)to = (void *)(uintptr_t)(found.device + 1); return SUCCESS; /* context */
    case 2: *(unsigned *)to = found.kind == DEVICE_MEMORY ? 2 : 1; return SUCCESS; /* CUmemorytype */
    case 3: *(uint64_t *)to = address; return SUCCESS;
    case 4: *(uint64_t *)to = found.kind == DEVICE_MEMORY ? 0 : address; return SUCCESS;
    case 7: *(uint64_t *)to = found.address; return SUCCESS; /* buffer's number */
    case 8: *(unsigned *)to = found.kind == MANAGED_MEMORY; return SUCCESS;
    case 9: *(int *)to = found.device; return SUCCESS;
    case 10: *(int *)to = 0; return SUCCESS; /* inter-process handles */
    case 11: *(uint64_t *)to = found.address; return SUCCESS;
    case 12: *(size_t *)to = found.size; return SUCCESS;
    case 13: *(int *)to = 1; return SUCCESS;
    default: return NOT_SUPPORTED;
    }
}
EXPORT int cuPointerGetAttribute(void *to, int attribute, uint64_t address) {
    return pointer_attribute(to, attribute, address);
}
EXPORT int cuPointerGetAttributes(unsigned count, const int *attributes, void **to, uint64_t address) {
    for (unsigned i = 0; i < count; i++) pointer_attribute(to[i], attributes[i], address);
    return SUCCESS;
}

/* Streams and events are the runtime's. */
#define SAME(driver, runtime, parameters, arguments) \
    extern int runtime parameters;                   \
    EXPORT int driver parameters { return runtime arguments; }
SAME(cuStreamCreate, cudaStreamCreateWithFlags, (void **s, unsigned f), (s, f))
SAME(cuStreamCreateWithPriority, cudaStreamCreateWithPriority, (void **s, unsigned f, int p), (s, f, p))
SAME(cuStreamDestroy_v2, cudaStreamDestroy, (void *s), (s))
SAME(cuStreamSynchronize, cudaStreamSynchronize, (void *s), (s))
SAME(cuStreamQuery, cudaStreamQuery, (void *s), (s))
SAME(cuStreamWaitEvent, cudaStreamWaitEvent, (void *s, void *e, unsigned f), (s, e, f))
SAME(cuStreamIsCapturing, cudaStreamIsCapturing, (void *s, int *status), (s, status))
SAME(cuEventCreate, cudaEventCreateWithFlags, (void **e, unsigned f), (e, f))
SAME(cuEventDestroy_v2, cudaEventDestroy, (void *e), (e))
SAME(cuEventRecord, cudaEventRecord, (void *e, void *s), (e, s))
SAME(cuEventQuery, cudaEventQuery, (void *e), (e))
SAME(cuEventSynchronize, cudaEventSynchronize, (void *e), (e))
SAME(cuEventElapsedTime, cudaEventElapsedTime, (float *t, void *a, void *b), (t, a, b))

/* Modules: every function asked for is in them. */
EXPORT int cuModuleLoad(void **module, const char *path) { return (void)path, *module = calloc(1, 1), SUCCESS; }
EXPORT int cuModuleLoadData(void **module, const void *image) { return (void)image, *module = calloc(1, 1), SUCCESS; }
EXPORT int cuModuleLoadDataEx(void **module, const void *image, unsigned n, int *options, void **values) {
    return (void)n, (void)options, (void)values, cuModuleLoadData(module, image);
}
EXPORT int cuModuleUnload(void *module) { return free(module), SUCCESS; }
EXPORT int cuModuleGetFunction(void **function, void *module, const char *name) {
    return (void)name, *function = module, SUCCESS;
}
EXPORT int cuModuleGetGlobal_v2(uint64_t *address, size_t *size, void *module, const char *name) {
    (void)module, (void)name;
    if (size) *size = 8;
    return address ? device_allocate(current_device(), 512, address) : SUCCESS;
}
EXPORT int cuLibraryLoadData(void **library, const void *code, ...) { return cuModuleLoadData(library, code); }
EXPORT int cuLibraryUnload(void *library) { return cuModuleUnload(library); }
EXPORT int cuLibraryGetKernel(void **kernel, void *library, const char *name) {
    return (void)name, *kernel = library, SUCCESS;
}
EXPORT int cuKernelGetFunction(void **function, void *kernel) { return *function = kernel, SUCCESS; }
EXPORT int cuFuncGetAttribute(int *value, int attribute, void *function) {
    (void)function;
    const int values[] = {1024, 0, 0, 0, 32, card()->capability, card()->capability};
    *value = attribute >= 0 && attribute < 7 ? values[attribute] : 0;
    return SUCCESS;
}
EXPORT int cuFuncSetAttribute(void *f, int attribute, int value) {
    return (void)f, (void)attribute, (void)value, SUCCESS;
}
EXPORT int cuFuncSetCacheConfig(void *f, int config) { return (void)f, (void)config, SUCCESS; }
EXPORT int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                          unsigned shared, void *stream, void **arguments, void **extra) {
    (void)gx, (void)gz, (void)bx, (void)by, (void)bz, (void)shared, (void)extra;
    return launch(function, arguments, gy, stream);
}
struct launch_config { /* CUlaunchConfig */
    unsigned grid[3], block[3], shared;
    void *stream, *attributes;
    unsigned attribute_count;
};
EXPORT int cuLaunchKernelEx(const struct launch_config *config, void *function, void **arguments, void **extra) {
    return cuLaunchKernel(function, 0, 0, 0, 0, 0, 0, 0, config->stream, arguments, extra);
}
EXPORT int cuLaunchCooperativeKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                                     unsigned bz, unsigned shared, void *stream, void **arguments) {
    return cuLaunchKernel(function, gx, gy, gz, bx, by, bz, shared, stream, arguments, NULL);
}
EXPORT int cuTensorMapEncodeTiled(void *map, ...) { return memset(map, 0, 128), SUCCESS; }
EXPORT int cuTensorMapEncodeIm2col(void *map, ...) { return memset(map, 0, 128), SUCCESS; }

/* Asked for by name at start, and not answered when called. */
#define UNANSWERED(name) \
    EXPORT int name(void) { unanswered(#name); }
UNANSWERED(cuCtxFromGreenCtx)
UNANSWERED(cuGreenCtxCreate)
UNANSWERED(cuGreenCtxDestroy)
UNANSWERED(cuGreenCtxStreamCreate)
UNANSWERED(cuDevResourceGenerateDesc)
UNANSWERED(cuDevSmResourceSplitByCount)
UNANSWERED(cuDeviceGetDevResource)
UNANSWERED(cuMemExportToShareableHandle)
UNANSWERED(cuMemImportFromShareableHandle)
UNANSWERED(cuMulticastAddDevice)
UNANSWERED(cuMulticastBindMem)
UNANSWERED(cuMulticastCreate)
UNANSWERED(cuMulticastUnbind)

/* Logs of the driver: there are none. */
EXPORT int cuLogsRegisterCallback(void *function, void *data, void **handle) {
    return (void)function, (void)data, *handle = NULL, SUCCESS;
}
EXPORT int cuLogsUnregisterCallback(void *handle) { return (void)handle, SUCCESS; }

/* Functions by name: those of this library, with the suffix of a later version where there is no other. */
static void *answer_to(const char *symbol) {
    static void *self;
    Dl_info info;
    if (!self && dladdr((void *)answer_to, &info)) self = dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    char later[160];
    const char *suffixes[] = {"", "_v2", "_v3"};
    for (int i = 0; self && i < 3; i++) {
        snprintf(later, sizeof later, "%s%s", symbol, suffixes[i]);
        void *found = dlsym(self, later);
        if (found) return found;
    }
    return NULL;
}
EXPORT int cudaGetDriverEntryPointByVersion(const char *symbol, void **function, unsigned version,
                                            unsigned long long flags, int *status) {
    (void)version, (void)flags;
    *function = answer_to(symbol);
    if (status) *status = *function ? 0 : 1; /* cudaDriverEntryPointSymbolNotFound */
    return SUCCESS;
}
EXPORT int cudaGetDriverEntryPoint(const char *symbol, void **function, unsigned long long flags, int *status) {
    return cudaGetDriverEntryPointByVersion(symbol, function, 0, flags, status);
}
EXPORT int cuGetProcAddress_v2(const char *symbol, void **function, int version, uint64_t flags, int *status) {
    (void)version, (void)flags;
    *function = answer_to(symbol);
    if (status) *status = *function ? 0 : 1;
    return *function ? SUCCESS : NOT_FOUND;
}
EXPORT int cuGetProcAddress(const char *symbol, void **function, int version, uint64_t flags) {
    return cuGetProcAddress_v2(symbol, function, version, flags, NULL);
}

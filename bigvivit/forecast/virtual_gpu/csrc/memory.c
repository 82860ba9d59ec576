/* Device memory: addresses and a count of bytes, nothing behind them. Host memory: real.
 *
 * Answers: cudaMalloc and cudaMallocAsync until the GPU's memory less its context is taken, cudaHostAlloc and
 * registered and managed memory (the host's), copies and sets in every direction, what a pointer is.
 * What is read back from a device: values.c and results.c.
 * Does not answer: inter-process handles of memory (refused by CUDA's own error). A device allocation of 2 MiB and more takes whole pages of 2 MiB;
 * the driver's own packing of smaller ones is not imitated. Managed memory takes none of the device. Each process
 * counts for itself: what another rank takes of the same GPU is not seen.
 */
#include "virtual_gpu.h"
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define STEP (32 * MIB)                 /* addresses of allocations, as seen on real GPUs */
#define LOWEST ((uint64_t)1 << 42)      /* of device addresses: hosts use lower and higher ones */
#define HIGHEST ((uint64_t)84 << 40)

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* Bytes taken of each GPU, as this process sees them. */
static struct { size_t used, peak; int active; } devices[MAX_GPUS];

static int take(int device, size_t size) {
    if (devices[device].used + size > card()->memory) return OUT_OF_MEMORY;
    devices[device].used += size;
    if (devices[device].used > devices[device].peak) devices[device].peak = devices[device].used;
    return SUCCESS;
}

static void make_context(int device) {
    if (devices[device].active) return;
    devices[device].active = 1;
    if (take(device, card()->context) != SUCCESS) devices[device].used = devices[device].peak = card()->memory;
}

void touch(int device) {
    if (device >= visible_count()) return;
    pthread_mutex_lock(&lock);
    make_context(device);
    pthread_mutex_unlock(&lock);
}

int context_active(int device) { return device >= 0 && device < MAX_GPUS && devices[device].active; }

int charge(int device, size_t size) {
    pthread_mutex_lock(&lock);
    make_context(device);
    int result = take(device, size);
    pthread_mutex_unlock(&lock);
    return result;
}

void discharge(int device, size_t size) {
    pthread_mutex_lock(&lock);
    devices[device].used -= size;
    pthread_mutex_unlock(&lock);
}

void device_memory(int device, size_t *free_bytes, size_t *total_bytes) {
    touch(device);
    *total_bytes = card()->memory;
    *free_bytes = card()->memory - devices[device].used;
}

/* For Python: the most that a device had handed out at once, context included. */
EXPORT size_t bigvivit_virtual_gpu_driver_peak(int device) {
    return device >= 0 && device < MAX_GPUS ? devices[device].peak : 0;
}
EXPORT size_t bigvivit_virtual_gpu_driver_bytes(int device) {
    return device >= 0 && device < MAX_GPUS ? devices[device].used : 0;
}

/* Addresses: each device has its share; the highest free place that is large enough is taken. */
struct hole { uint64_t low, high; };
static struct { struct hole *holes; size_t count, room; int ready; } spaces[MAX_GPUS];

static void insert_hole(int device, size_t at, struct hole hole) {
    if (spaces[device].count == spaces[device].room) {
        spaces[device].room = spaces[device].room ? 2 * spaces[device].room : 64;
        spaces[device].holes = realloc(spaces[device].holes, spaces[device].room * sizeof(struct hole));
        if (!spaces[device].holes) abort();
    }
    memmove(&spaces[device].holes[at + 1], &spaces[device].holes[at], (spaces[device].count - at) * sizeof hole);
    spaces[device].holes[at] = hole;
    spaces[device].count++;
}

static void remove_hole(int device, size_t at) {
    spaces[device].count--;
    memmove(&spaces[device].holes[at], &spaces[device].holes[at + 1],
            (spaces[device].count - at) * sizeof(struct hole));
}

static uint64_t in_steps(size_t size) { return (size + STEP - 1) / STEP * STEP; }

static int take_addresses(int device, size_t size, uint64_t *address) {
    if (!spaces[device].ready) {
        uint64_t share = (HIGHEST - LOWEST) / (uint64_t)visible_count() / STEP * STEP;
        insert_hole(device, 0, (struct hole){LOWEST + share * (uint64_t)device, LOWEST + share * (uint64_t)(device + 1)});
        spaces[device].ready = 1;
    }
    uint64_t wanted = in_steps(size ? size : 1);
    for (size_t i = 0; i < spaces[device].count; i++) { /* from the highest */
        struct hole *hole = &spaces[device].holes[i];
        if (hole->high - hole->low < wanted) continue;
        hole->high -= wanted;
        *address = hole->high;
        if (hole->high == hole->low) remove_hole(device, i);
        return SUCCESS;
    }
    return OUT_OF_MEMORY;
}

static void give_addresses(int device, uint64_t address, size_t size) {
    struct hole freed = {address, address + in_steps(size ? size : 1)};
    size_t at = 0;
    while (at < spaces[device].count && spaces[device].holes[at].low > address) at++;
    if (at > 0 && spaces[device].holes[at - 1].low == freed.high) {
        freed.high = spaces[device].holes[at - 1].high;
        remove_hole(device, --at);
    }
    if (at < spaces[device].count && spaces[device].holes[at].high == freed.low) {
        freed.low = spaces[device].holes[at].low;
        remove_hole(device, at);
    }
    insert_hole(device, at, freed);
}

int reserve_addresses(int device, size_t size, uint64_t *address) {
    pthread_mutex_lock(&lock);
    int result = take_addresses(device, size, address);
    pthread_mutex_unlock(&lock);
    return result;
}

void release_addresses(int device, uint64_t address, size_t size) {
    pthread_mutex_lock(&lock);
    give_addresses(device, address, size);
    pthread_mutex_unlock(&lock);
}

/* What lives where, by ascending address. */
static struct range *ranges;
static size_t range_count, range_room;

static size_t first_above(uint64_t address) {
    size_t low = 0, high = range_count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (ranges[middle].address > address) high = middle;
        else low = middle + 1;
    }
    return low;
}

static int insert_range(struct range added) {
    if (range_count == range_room) {
        range_room = range_room ? 2 * range_room : 1024;
        ranges = realloc(ranges, range_room * sizeof *ranges);
        if (!ranges) abort();
    }
    size_t at = first_above(added.address);
    memmove(&ranges[at + 1], &ranges[at], (range_count - at) * sizeof *ranges);
    ranges[at] = added;
    range_count++;
    return SUCCESS;
}

static int take_range(uint64_t address, struct range *removed) {
    size_t at = first_above(address);
    if (at == 0 || ranges[at - 1].address != address) return INVALID_VALUE;
    *removed = ranges[at - 1];
    range_count--;
    memmove(&ranges[at - 1], &ranges[at], (range_count - at + 1) * sizeof *ranges);
    return SUCCESS;
}

int add_range(struct range added) {
    pthread_mutex_lock(&lock);
    int result = insert_range(added);
    pthread_mutex_unlock(&lock);
    return result;
}

int remove_range(uint64_t address, struct range *removed) {
    pthread_mutex_lock(&lock);
    int result = take_range(address, removed);
    pthread_mutex_unlock(&lock);
    return result;
}

int find_range(uint64_t address, struct range *found) {
    pthread_mutex_lock(&lock);
    size_t at = first_above(address);
    int here = at > 0 && address < ranges[at - 1].address + (ranges[at - 1].size ? ranges[at - 1].size : 1);
    if (here) *found = ranges[at - 1];
    pthread_mutex_unlock(&lock);
    return here;
}

static size_t pages(size_t size) { return size < 2 * MIB ? size : (size + 2 * MIB - 1) / (2 * MIB) * (2 * MIB); }

int device_allocate(int device, size_t size, uint64_t *address) {
    pthread_mutex_lock(&lock);
    make_context(device);
    int result = take(device, pages(size));
    if (result == SUCCESS && (result = take_addresses(device, size, address)) != SUCCESS)
        devices[device].used -= pages(size);
    if (result == SUCCESS) insert_range((struct range){*address, size, pages(size), device, DEVICE_MEMORY, 0});
    pthread_mutex_unlock(&lock);
    return result;
}

int device_free(uint64_t address) {
    struct range removed;
    pthread_mutex_lock(&lock);
    int result = take_range(address, &removed);
    if (result == SUCCESS && removed.kind != DEVICE_MEMORY) {
        insert_range(removed);
        result = INVALID_VALUE;
    }
    if (result == SUCCESS) {
        forget_values(address, removed.size);
        devices[removed.device].used -= removed.charged;
        give_addresses(removed.device, address, removed.size);
    }
    pthread_mutex_unlock(&lock);
    return result;
}

static int host_free(void *pointer, enum memory_kind kind);

EXPORT int cudaMalloc(void **pointer, size_t size) {
    uint64_t address;
    int result = size ? device_allocate(current_device(), size, &address) : SUCCESS;
    *pointer = result == SUCCESS && size ? (void *)address : NULL;
    return fail(result);
}
EXPORT int cudaFree(void *pointer) {
    struct range found;
    touch(current_device());
    if (!pointer) return SUCCESS;
    if (find_range((uint64_t)pointer, &found) && found.kind == MANAGED_MEMORY)
        return host_free(pointer, MANAGED_MEMORY);
    return fail(device_free((uint64_t)pointer));
}
EXPORT int cudaMemGetInfo(size_t *free_bytes, size_t *total_bytes) {
    device_memory(current_device(), free_bytes, total_bytes);
    return SUCCESS;
}

/* Pools of cudaMallocAsync: what is freed is the device's again at once. */
static struct { size_t used, high; } pools[MAX_GPUS];

EXPORT int cudaMallocAsync(void **pointer, size_t size, void *stream) {
    (void)stream;
    int device = current_device(), result = cudaMalloc(pointer, size);
    if (result == SUCCESS && (pools[device].used += size) > pools[device].high) pools[device].high = pools[device].used;
    return result;
}
EXPORT int cudaFreeAsync(void *pointer, void *stream) {
    struct range found;
    (void)stream;
    if (pointer && find_range((uint64_t)pointer, &found)) pools[found.device].used -= found.size;
    return cudaFree(pointer);
}
EXPORT int cudaDeviceGetDefaultMemPool(void **pool, int device) { return *pool = (void *)(uintptr_t)(device + 1), 0; }
EXPORT int cudaDeviceGetMemPool(void **pool, int device) { return *pool = (void *)(uintptr_t)(device + 1), 0; }
EXPORT int cudaMemPoolSetAttribute(void *pool, int attribute, void *value) {
    (void)value;
    int device = (int)(uintptr_t)pool - 1;
    if (attribute == 6 || attribute == 8) pools[device].high = pools[device].used; /* the peaks, set back */
    return SUCCESS;
}
EXPORT int cudaMemPoolGetAttribute(void *pool, int attribute, void *value) {
    int device = (int)(uintptr_t)pool - 1;
    if (attribute <= 3) *(int *)value = 1;
    else if (attribute == 4) *(uint64_t *)value = 0;
    else *(uint64_t *)value = attribute == 5 || attribute == 7 ? pools[device].used : pools[device].high;
    return SUCCESS;
}
EXPORT int cudaMemPoolSetAccess(void *pool, const void *access, size_t n) { return (void)pool, (void)access, (void)n, 0; }
EXPORT int cudaMemPoolTrimTo(void *pool, size_t keep) { return (void)pool, (void)keep, SUCCESS; }

/* The host's memory: pinned, managed, registered. */
static size_t locked, locked_peak; /* page-locked by this process */
EXPORT size_t bigvivit_virtual_gpu_locked_peak(void) { return __atomic_load_n(&locked_peak, __ATOMIC_RELAXED); }

static int lock_pages(struct range added) {
    int result = add_range(added);
    size_t now = __atomic_add_fetch(&locked, added.size, __ATOMIC_RELAXED);
    if (now > __atomic_load_n(&locked_peak, __ATOMIC_RELAXED)) __atomic_store_n(&locked_peak, now, __ATOMIC_RELAXED);
    return result;
}

/* Zeros take no memory where pages can be given back: they read as zero. What came from the device mostly is zero, and
 * a host that keeps what a 80 GB card offloads need not be at hand. */
void clear_bytes(void *to, size_t size) {
    struct range found;
    uint64_t low = ((uint64_t)to + 4095) & ~(uint64_t)4095, high = ((uint64_t)to + size) & ~(uint64_t)4095;
    if (size < MIB || !find_range((uint64_t)to, &found) || !found.ours || madvise((void *)low, high - low, MADV_DONTNEED)) {
        memset(to, 0, size);
        return;
    }
    memset(to, 0, low - (uint64_t)to);
    memset((void *)high, 0, (uint64_t)to + size - high);
}

static int host_allocate(void **pointer, size_t size, enum memory_kind kind) {
    if (posix_memalign(pointer, 4096, size ? size : 1)) return fail(OUT_OF_MEMORY);
    return lock_pages((struct range){(uint64_t)*pointer, size, 0, current_device(), kind, 1});
}
static int host_free(void *pointer, enum memory_kind kind) {
    struct range removed;
    if (!pointer) return SUCCESS;
    if (remove_range((uint64_t)pointer, &removed) != SUCCESS) return fail(INVALID_VALUE);
    if (removed.kind != kind || !removed.ours) return add_range(removed), fail(INVALID_VALUE);
    __atomic_sub_fetch(&locked, removed.size, __ATOMIC_RELAXED);
    free(pointer);
    return SUCCESS;
}
EXPORT int cudaHostAlloc(void **pointer, size_t size, unsigned flags) {
    (void)flags;
    touch(current_device());
    return host_allocate(pointer, size, HOST_MEMORY);
}
EXPORT int cudaMallocHost(void **pointer, size_t size) { return cudaHostAlloc(pointer, size, 0); }
EXPORT int cudaFreeHost(void *pointer) { return host_free(pointer, HOST_MEMORY); }
EXPORT int cudaMallocManaged(void **pointer, size_t size, unsigned flags) {
    (void)flags;
    touch(current_device());
    return host_allocate(pointer, size, MANAGED_MEMORY);
}
EXPORT int cudaHostRegister(void *pointer, size_t size, unsigned flags) {
    struct range found;
    (void)flags;
    if (find_range((uint64_t)pointer, &found)) return fail(HOST_ALREADY_REGISTERED);
    return lock_pages((struct range){(uint64_t)pointer, size, 0, current_device(), HOST_MEMORY, 0});
}
EXPORT int cudaHostUnregister(void *pointer) {
    struct range removed;
    if (remove_range((uint64_t)pointer, &removed) != SUCCESS) return fail(HOST_NOT_REGISTERED);
    __atomic_sub_fetch(&locked, removed.size, __ATOMIC_RELAXED);
    return SUCCESS;
}
EXPORT int cudaHostGetDevicePointer(void **device, void *host, unsigned flags) { return (void)flags, *device = host, 0; }
EXPORT int cudaHostGetFlags(unsigned *flags, void *host) { return (void)host, *flags = 0, SUCCESS; }
EXPORT int cudaMemPrefetchAsync(const void *p, size_t n, ...) { return (void)p, (void)n, SUCCESS; }
EXPORT int cudaMemPrefetchAsync_v2(const void *p, size_t n, ...) { return (void)p, (void)n, SUCCESS; }
EXPORT int cudaMemAdvise(const void *p, size_t n, ...) { return (void)p, (void)n, SUCCESS; }

struct pointer_attributes {
    int type, device;
    void *device_pointer, *host_pointer;
    long reserved[8]; /* of CUDA 13; left alone in CUDA 12 */
};
EXPORT int cudaPointerGetAttributes(struct pointer_attributes *to, const void *pointer) {
    struct range found = {.kind = UNKNOWN_MEMORY, .device = -2}; /* cudaInvalidDeviceId */
    find_range((uint64_t)pointer, &found);
    to->type = (int)found.kind;
    to->device = found.device;
    to->device_pointer = found.kind ? (void *)pointer : NULL;
    to->host_pointer = found.kind == DEVICE_MEMORY ? NULL : (void *)pointer;
    return SUCCESS;
}

static int on_device(const void *pointer) {
    struct range found;
    return find_range((uint64_t)pointer, &found) && found.kind == DEVICE_MEMORY;
}

static void copy(void *to, const void *from, size_t size) {
    if (!size) return;
    int to_device = on_device(to), from_device = on_device(from);
    if (to_device && from_device) copy_values((uint64_t)to, (uint64_t)from, size), note_copy(size);
    else if (to_device) set_values((uint64_t)to, from, size);
    else if (!from_device) memmove(to, from, size);
    else if (!get_values((uint64_t)from, to, size)) read_result(to, size);
}
EXPORT int cudaMemcpy(void *to, const void *from, size_t size, int kind) {
    (void)kind;
    copy(to, from, size);
    return SUCCESS;
}
EXPORT int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *stream) {
    (void)kind;
    touch(current_device());
    count_captured_node(stream);
    copy(to, from, size);
    return SUCCESS;
}
EXPORT int cudaMemcpyPeer(void *to, int d, const void *from, int s, size_t size) {
    return (void)d, (void)s, copy(to, from, size), SUCCESS;
}
EXPORT int cudaMemcpyPeerAsync(void *to, int d, const void *from, int s, size_t size, void *stream) {
    (void)d, (void)s;
    return cudaMemcpyAsync(to, from, size, 4, stream);
}
EXPORT int cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height,
                             int kind, void *stream) {
    (void)kind;
    count_captured_node(stream);
    for (size_t row = 0; row < height; row++)
        copy((char *)to + row * to_pitch, (const char *)from + row * from_pitch, width);
    return SUCCESS;
}
EXPORT int cudaMemcpyBatchAsync(void **to, const void **from, const size_t *sizes, size_t count, ...) {
    for (size_t i = 0; i < count; i++) copy(to[i], from[i], sizes[i]);
    return SUCCESS;
}
EXPORT int cudaMemset(void *pointer, int value, size_t size) {
    if (on_device(pointer)) forget_values((uint64_t)pointer, size);
    else memset(pointer, value, size);
    return SUCCESS;
}
EXPORT int cudaMemsetAsync(void *pointer, int value, size_t size, void *stream) {
    count_captured_node(stream);
    return cudaMemset(pointer, value, size);
}

EXPORT int cudaIpcGetMemHandle(void *handle, void *pointer) { return (void)handle, (void)pointer, fail(NOT_SUPPORTED); }
EXPORT int cudaIpcOpenMemHandle(void **pointer, ...) { return (void)pointer, fail(NOT_SUPPORTED); }
EXPORT int cudaIpcCloseMemHandle(void *pointer) { return (void)pointer, fail(NOT_SUPPORTED); }
EXPORT int cudaIpcGetEventHandle(void *handle, void *event) { return (void)handle, (void)event, fail(NOT_SUPPORTED); }

/* Variables of kernels have an address, and no value. */
EXPORT int cudaGetSymbolAddress(void **pointer, const void *symbol) { return *pointer = (void *)symbol, SUCCESS; }
EXPORT int cudaMemcpyToSymbol(const void *symbol, const void *from, size_t size, size_t offset, int kind) {
    return (void)symbol, (void)from, (void)size, (void)offset, (void)kind, SUCCESS;
}
EXPORT int cudaMemcpyToSymbolAsync(const void *symbol, const void *from, size_t size, size_t offset, int kind, void *s) {
    return (void)symbol, (void)from, (void)size, (void)offset, (void)kind, (void)s, SUCCESS;
}

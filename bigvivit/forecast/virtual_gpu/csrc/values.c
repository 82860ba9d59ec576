/* Values: what a device holds where it is known. Everything else reads as zero.
 *
 * Known are up to 1 MiB at once that came from the host, by copy or by a collective, or was filled with one value
 * (results.c), and copies of these on the device, until PyTorch's allocator hands the memory out anew. Kernels are not run, so what one wrote over known values since
 * then is not seen: a tensor made on the host reads as it was made, one that a kernel made reads as zero.
 * PyTorch tells its profiler of each block that it hands out or takes back; that call comes by here first.
 */
#include "virtual_gpu.h"
#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#define ALL_TOGETHER (256 * MIB)

struct known {
    uint64_t address;
    size_t size;
    char *bytes;
};
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct known *table; /* by ascending address, without overlaps */
static size_t count, room, total;

/* The first entry that ends behind an address. */
static size_t first_behind(uint64_t address) {
    size_t low = 0, high = count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (table[middle].address + table[middle].size > address) high = middle;
        else low = middle + 1;
    }
    return low;
}

static void insert(size_t at, uint64_t address, const char *bytes, size_t size) {
    if (total + size > ALL_TOGETHER) return;
    if (count == room) {
        room = room ? 2 * room : 1024;
        table = realloc(table, room * sizeof *table);
        if (!table) abort();
    }
    char *copy = malloc(size);
    if (!copy) abort();
    memcpy(copy, bytes, size);
    memmove(&table[at + 1], &table[at], (count - at) * sizeof *table);
    table[at] = (struct known){address, size, copy};
    count++;
    total += size;
}

/* Forget [from, to); what stands out of an entry on either side stays known. */
static void forget(uint64_t from, uint64_t to) {
    size_t at = first_behind(from);
    while (at < count && table[at].address < to) {
        struct known gone = table[at];
        count--;
        total -= gone.size;
        memmove(&table[at], &table[at + 1], (count - at) * sizeof *table);
        if (gone.address < from) insert(at++, gone.address, gone.bytes, from - gone.address);
        if (gone.address + gone.size > to) insert(at, to, gone.bytes + (to - gone.address), gone.address + gone.size - to);
        free(gone.bytes);
    }
}

void forget_values(uint64_t address, size_t size) {
    if (!__atomic_load_n(&count, __ATOMIC_RELAXED)) return;
    pthread_mutex_lock(&lock);
    forget(address, address + size);
    pthread_mutex_unlock(&lock);
}

void set_values(uint64_t address, const void *bytes, size_t size) {
    pthread_mutex_lock(&lock);
    forget(address, address + size);
    if (size && size <= LARGEST_VALUES) insert(first_behind(address), address, bytes, size);
    pthread_mutex_unlock(&lock);
}

int64_t get_values(uint64_t address, void *to, size_t size) {
    int64_t found = 0;
    clear_bytes(to, size);
    pthread_mutex_lock(&lock);
    for (size_t at = first_behind(address); at < count && table[at].address < address + size; at++) {
        uint64_t low = table[at].address > address ? table[at].address : address;
        uint64_t end = table[at].address + table[at].size, high = end < address + size ? end : address + size;
        memcpy((char *)to + (low - address), table[at].bytes + (low - table[at].address), high - low);
        found += (int64_t)(high - low);
    }
    pthread_mutex_unlock(&lock);
    return found;
}

void copy_values(uint64_t to, uint64_t from, size_t size) {
    if (!__atomic_load_n(&count, __ATOMIC_RELAXED)) return;
    char *bytes = size <= LARGEST_VALUES ? malloc(size) : NULL;
    if (bytes && get_values(from, bytes, size)) set_values(to, bytes, size);
    else forget_values(to, size);
    free(bytes);
}

/* c10::reportMemoryUsageToProfiler(void*, int64_t, size_t, size_t, c10::Device) */
struct device {
    signed char type, index;
};
EXPORT void _ZN3c1027reportMemoryUsageToProfilerEPvlmmNS_6DeviceE(void *pointer, int64_t size, size_t allocated,
                                                                 size_t reserved, struct device device) {
    static void (*real)(void *, int64_t, size_t, size_t, struct device);
    if (device.type == 1 && size > 0) forget_values((uint64_t)pointer, (size_t)size); /* CUDA */
    if (!real) {
        void *library = dlopen("libc10.so", RTLD_LAZY | RTLD_NOLOAD);
        if (library) *(void **)&real = dlsym(library, "_ZN3c1027reportMemoryUsageToProfilerEPvlmmNS_6DeviceE");
    }
    if (real) real(pointer, size, allocated, reserved, device);
}

/* The virtual GPUs themselves: how many, which one is current, their properties and attributes, errors, occupancy.
 *
 * Answers: the card of BIGVIVIT_VIRTUAL_GPU, CUDA_VISIBLE_DEVICES by number, peer access between all GPUs of the node.
 * Does not answer: UUIDs in CUDA_VISIBLE_DEVICES, MIG, clocks and temperatures as a real card would show them.
 * Occupancy knows threads and blocks of a multiprocessor, not a kernel's registers (32 are taken for each thread).
 */
#include "virtual_gpu.h"
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static struct card the_card;
static int visible[MAX_GPUS], visible_gpus;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static __thread int current, last_error;

_Noreturn void unanswered(const char *symbol) {
    fprintf(stderr,
            "bigvivit's virtual GPU has no answer to %s: the program needs a part of CUDA that is not imitated%s. "
            "The Python lines that asked for it follow.\n",
            symbol, strncmp(symbol, "cudnn", 5) ? "" : " (torch.backends.cudnn.enabled = False goes round cuDNN)");
    abort();
}

static void set_field(const char *key, const char *value) {
    const struct { const char *key; int *number; } numbers[] = {
        {"gpus", &the_card.gpus},
        {"capability", &the_card.capability},
        {"multiprocessors", &the_card.multiprocessors},
        {"threads_per_multiprocessor", &the_card.threads_per_multiprocessor},
        {"blocks_per_multiprocessor", &the_card.blocks_per_multiprocessor},
    };
    const struct { const char *key; size_t *bytes; } sizes[] = {
        {"memory", &the_card.memory},
        {"context", &the_card.context},
        {"communicator", &the_card.communicator},
        {"l2", &the_card.l2},
        {"shared_per_multiprocessor", &the_card.shared_per_multiprocessor},
        {"shared_per_block", &the_card.shared_per_block},
    };
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        if (!strcmp(key, numbers[i].key)) *numbers[i].number = atoi(value);
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        if (!strcmp(key, sizes[i].key)) *sizes[i].bytes = strtoull(value, NULL, 10);
    if (!strcmp(key, "name")) snprintf(the_card.name, sizeof the_card.name, "%s", value);
}

/* CUDA_VISIBLE_DEVICES as CUDA reads it: numbers up to the first that is none, or no GPU's. */
static void choose_visible(void) {
    const char *text = getenv("CUDA_VISIBLE_DEVICES");
    if (!text) {
        for (int i = 0; i < the_card.gpus; i++) visible[visible_gpus++] = i;
        return;
    }
    while (visible_gpus < MAX_GPUS) {
        char *end;
        long number = strtol(text, &end, 10);
        if (end == text || number < 0 || number >= the_card.gpus) return;
        visible[visible_gpus++] = (int)number;
        if (*end != ',') return;
        text = end + 1;
    }
}

static void read_card(void) {
    const char *text = getenv("BIGVIVIT_VIRTUAL_GPU");
    if (!text) return; /* preloaded by hand: a machine without a GPU */
    char *copy = strdup(text), *rest = NULL;
    for (char *field = strtok_r(copy, ";", &rest); field; field = strtok_r(NULL, ";", &rest)) {
        char *value = strchr(field, '=');
        if (!value) continue;
        *value++ = 0;
        set_field(field, value);
    }
    free(copy);
    static const int built_for[] = {CODE_LIST};
    for (size_t i = 0; i < sizeof built_for / sizeof *built_for; i++)
        if (built_for[i] <= the_card.capability && built_for[i] > the_card.code) the_card.code = built_for[i];
    if (the_card.gpus > MAX_GPUS) the_card.gpus = MAX_GPUS;
    choose_visible();
}

const struct card *card(void) {
    pthread_once(&once, read_card);
    return &the_card;
}

int visible_count(void) {
    card();
    return visible_gpus;
}

int current_device(void) { return current; }
int physical_device(int device) { return visible[device]; }

void write_uuid(int physical, char bytes[16]) {
    memcpy(bytes, "virtual-gpu-\0\0\0", 16);
    bytes[15] = (char)physical;
}

int fail(int code) {
    if (code != SUCCESS && code != NOT_READY) last_error = code;
    return code;
}

EXPORT int cudaGetLastError(void) {
    int error = last_error;
    last_error = SUCCESS;
    return error;
}
EXPORT int cudaPeekAtLastError(void) { return last_error; }

static const struct { int code; const char *name, *runtime_name, *text; } errors[] = {
    {SUCCESS, "CUDA_SUCCESS", "cudaSuccess", "no error"},
    {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "cudaErrorInvalidValue", "invalid argument"},
    {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "cudaErrorMemoryAllocation", "out of memory"},
    {NO_DEVICE, "CUDA_ERROR_NO_DEVICE", "cudaErrorNoDevice", "no CUDA-capable device is detected"},
    {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "cudaErrorInvalidDevice", "invalid device ordinal"},
    {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "cudaErrorInvalidResourceHandle", "invalid resource handle"},
    {NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "cudaErrorSymbolNotFound", "named symbol not found"},
    {NOT_READY, "CUDA_ERROR_NOT_READY", "cudaErrorNotReady", "device not ready"},
    {PEER_ALREADY_ENABLED, "CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED", "cudaErrorPeerAccessAlreadyEnabled",
     "peer access is already enabled"},
    {HOST_ALREADY_REGISTERED, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED", "cudaErrorHostMemoryAlreadyRegistered",
     "part or all of the requested memory range is already mapped"},
    {HOST_NOT_REGISTERED, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED", "cudaErrorHostMemoryNotRegistered",
     "pointer does not correspond to a registered memory region"},
    {NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED", "cudaErrorNotSupported", "operation not supported"},
    {CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "cudaErrorStreamCaptureUnsupported",
     "operation not permitted when stream is capturing"},
    {CAPTURE_UNMATCHED, "CUDA_ERROR_STREAM_CAPTURE_UNMATCHED", "cudaErrorStreamCaptureUnmatched",
     "the capture was not initiated in this stream"},
};

static size_t error_row(int code) {
    for (size_t i = 0; i < sizeof errors / sizeof *errors; i++)
        if (errors[i].code == code) return i;
    return 1;
}
EXPORT const char *cudaGetErrorString(int code) { return errors[error_row(code)].text; }
EXPORT const char *cudaGetErrorName(int code) { return errors[error_row(code)].runtime_name; }
EXPORT int cuGetErrorString(int code, const char **text) {
    *text = errors[error_row(code)].text;
    return SUCCESS;
}
EXPORT int cuGetErrorName(int code, const char **name) {
    *name = errors[error_row(code)].name;
    return SUCCESS;
}

EXPORT int cudaGetDeviceCount(int *count) {
    *count = visible_count();
    return *count ? SUCCESS : fail(NO_DEVICE);
}
EXPORT int cudaGetDevice(int *device) {
    *device = current;
    return SUCCESS;
}
EXPORT int cudaSetDevice(int device) {
    if (device < 0 || device >= visible_count()) return fail(INVALID_DEVICE);
    current = device;
    touch(device);
    return SUCCESS;
}
EXPORT int cudaInitDevice(int device, unsigned flags, unsigned more) {
    (void)flags, (void)more;
    if (device < 0 || device >= visible_count()) return fail(INVALID_DEVICE);
    touch(device);
    return SUCCESS;
}
EXPORT int cudaDeviceReset(void) { return SUCCESS; }
EXPORT int cudaSetDeviceFlags(unsigned flags) { return (void)flags, SUCCESS; }
EXPORT int cudaGetDeviceFlags(unsigned *flags) { return *flags = 0, SUCCESS; }
EXPORT int cudaDeviceSynchronize(void) {
    touch(current);
    return SUCCESS;
}
EXPORT int cudaDeviceCanAccessPeer(int *can, int from, int to) { return *can = from != to, SUCCESS; }
EXPORT int cudaDeviceEnablePeerAccess(int peer, unsigned flags) {
    (void)flags;
    return peer < 0 || peer >= visible_count() || peer == current ? fail(INVALID_DEVICE) : SUCCESS;
}
EXPORT int cudaDeviceDisablePeerAccess(int peer) { return (void)peer, SUCCESS; }
EXPORT int cudaDeviceGetP2PAttribute(int *value, int attribute, int from, int to) {
    (void)from, (void)to;
    *value = attribute == 2 ? 1 : 0; /* access is supported */
    return SUCCESS;
}
EXPORT int cudaDeviceGetStreamPriorityRange(int *lowest, int *greatest) {
    if (lowest) *lowest = 0;
    if (greatest) *greatest = -5;
    return SUCCESS;
}
EXPORT int cudaDeviceGetPCIBusId(char *text, int length, int device) {
    if (device < 0 || device >= visible_count()) return fail(INVALID_DEVICE);
    snprintf(text, (size_t)length, "0000:%02X:00.0", visible[device] + 1);
    return SUCCESS;
}
EXPORT int cudaDeviceGetByPCIBusId(int *device, const char *text) {
    unsigned domain, bus;
    if (sscanf(text, "%x:%x", &domain, &bus) != 2) return fail(INVALID_VALUE);
    for (int i = 0; i < visible_count(); i++)
        if (visible[i] + 1 == (int)bus) return *device = i, SUCCESS;
    return fail(INVALID_DEVICE);
}
EXPORT int cudaDeviceGetLimit(size_t *value, int limit) { return (void)limit, *value = 1024, SUCCESS; }
EXPORT int cudaDeviceSetLimit(int limit, size_t value) { return (void)limit, (void)value, SUCCESS; }
EXPORT int cudaDriverGetVersion(int *version) { return *version = CUDA_VERSION_NUMBER, SUCCESS; }
EXPORT int cudaRuntimeGetVersion(int *version) { return *version = CUDA_VERSION_NUMBER, SUCCESS; }
EXPORT int cudaProfilerStart(void) { return SUCCESS; }
EXPORT int cudaProfilerStop(void) { return SUCCESS; }

/* cudaDeviceProp: CUDA 13 dropped eight numbers of CUDA 12's and added some behind. */
struct properties {
    char name[256], uuid[16], luid[8];
    unsigned luid_mask;
    size_t total_memory, shared_per_block;
    int registers_per_block, warp_size;
    size_t pitch;
    int max_threads_per_block, max_threads[3], max_grid[3];
#if CUDA_MAJOR < 13
    int clock_rate;
#endif
    size_t constant_memory;
    int major, minor;
    size_t texture_alignment, texture_pitch_alignment;
#if CUDA_MAJOR < 13
    int device_overlap;
#endif
    int multiprocessors;
#if CUDA_MAJOR < 13
    int execution_timeout;
#endif
    int integrated, can_map_host_memory;
#if CUDA_MAJOR < 13
    int compute_mode;
#endif
    int texture_1d, texture_1d_mipmap;
#if CUDA_MAJOR < 13
    int texture_1d_linear;
#endif
    int textures[2 + 2 + 3 + 2 + 3 + 3 + 1 + 2 + 3 + 2]; /* from maxTexture2D to maxTextureCubemapLayered */
    int surfaces[1 + 2 + 3 + 2 + 3 + 1 + 2];
    size_t surface_alignment;
    int concurrent_kernels, ecc, bus, pci_device, pci_domain, tcc, engines, unified_addressing;
#if CUDA_MAJOR < 13
    int memory_clock_rate;
#endif
    int memory_bus_width, l2, persisting_l2, threads_per_multiprocessor, stream_priorities, global_l1, local_l1;
    size_t shared_per_multiprocessor;
    int registers_per_multiprocessor, managed, multi_gpu_board, board_group, host_native_atomics;
#if CUDA_MAJOR < 13
    int single_to_double;
#endif
    int pageable_access, concurrent_managed, compute_preemption, host_pointer_for_registered, cooperative_launch;
#if CUDA_MAJOR < 13
    int cooperative_multi_device;
#endif
    size_t shared_per_block_optin;
    int pageable_host_tables, direct_managed, blocks_per_multiprocessor, access_window;
    size_t reserved_shared_per_block;
    int host_register, sparse_arrays, host_register_read_only, timeline_semaphores, memory_pools, rdma;
    unsigned rdma_flush;
    int rdma_ordering;
    unsigned pool_handles;
    int deferred_mapping, ipc_events, cluster_launch, unified_functions;
    int rest[63];
};
/* Sizes and places as the headers of CUDA 12.6, 12.9, 13.0 and 13.2 have them. */
#if CUDA_MAJOR < 13
_Static_assert(sizeof(struct properties) == 1032, "cudaDeviceProp of CUDA 12");
_Static_assert(offsetof(struct properties, shared_per_block_optin) == 696, "cudaDeviceProp of CUDA 12");
#else
_Static_assert(sizeof(struct properties) == 1008, "cudaDeviceProp of CUDA 13");
_Static_assert(offsetof(struct properties, shared_per_block_optin) == 672, "cudaDeviceProp of CUDA 13");
#endif

EXPORT int cudaGetDeviceProperties(struct properties *to, int device) {
    if (device < 0 || device >= visible_count()) return fail(INVALID_DEVICE);
    const struct card *c = card();
    memset(to, 0, sizeof *to);
    snprintf(to->name, sizeof to->name, "%s", c->name);
    write_uuid(visible[device], to->uuid);
    to->total_memory = c->memory;
    to->shared_per_block = 49152;
    to->registers_per_block = to->registers_per_multiprocessor = 65536;
    to->warp_size = 32;
    to->pitch = 2147483647;
    to->max_threads_per_block = to->max_threads[0] = to->max_threads[1] = 1024;
    to->max_threads[2] = 64;
    to->max_grid[0] = 2147483647;
    to->max_grid[1] = to->max_grid[2] = 65535;
    to->constant_memory = 65536;
    to->major = c->capability / 10;
    to->minor = c->capability % 10;
    to->texture_alignment = to->surface_alignment = 512;
    to->multiprocessors = c->multiprocessors;
    to->can_map_host_memory = to->concurrent_kernels = to->unified_addressing = to->stream_priorities = 1;
    to->bus = visible[device] + 1;
    to->engines = 3;
    to->memory_bus_width = 5120;
    to->l2 = (int)c->l2;
    to->threads_per_multiprocessor = c->threads_per_multiprocessor;
    to->global_l1 = to->local_l1 = to->managed = to->concurrent_managed = to->compute_preemption = 1;
    to->shared_per_multiprocessor = c->shared_per_multiprocessor;
    to->cooperative_launch = to->host_register = to->memory_pools = to->unified_functions = 1;
    to->shared_per_block_optin = c->shared_per_block;
    to->blocks_per_multiprocessor = c->blocks_per_multiprocessor;
    to->reserved_shared_per_block = c->capability >= 80 ? 1024 : 0;
    to->cluster_launch = c->capability >= 90;
    return SUCCESS;
}
EXPORT int cudaGetDeviceProperties_v2(struct properties *to, int device) { return cudaGetDeviceProperties(to, device); }

/* Attributes have the same numbers in the runtime and in the driver. */
static int attribute_of(int attribute, int device) {
    const struct card *c = card();
    switch (attribute) {
    case 1: case 2: case 3: return 1024;                        /* threads of a block */
    case 4: return 64;
    case 5: return 2147483647;                                  /* blocks of a grid */
    case 6: case 7: return 65535;
    case 8: return 49152;                                       /* shared memory of a block */
    case 9: return 65536;                                       /* constant memory */
    case 10: return 32;                                         /* warp */
    case 12: case 82: return 65536;                             /* registers */
    case 13: return 1410000;                                    /* clock, kHz */
    case 14: case 29: return 512;
    case 16: return c->multiprocessors;
    case 33: return physical_device(device) + 1;                /* PCI bus */
    case 36: return 1593000;                                    /* memory clock, kHz */
    case 37: return 5120;                                       /* memory bus, bits */
    case 38: return (int)c->l2;
    case 39: return c->threads_per_multiprocessor;
    case 40: return 3;
    case 75: return c->capability / 10;
    case 76: return c->capability % 10;
    case 81: return (int)c->shared_per_multiprocessor;
    case 97: return (int)c->shared_per_block;
    case 106: return c->blocks_per_multiprocessor;
    case 111: return c->capability >= 80 ? 1024 : 0;
    case 120: return c->capability >= 90;                       /* clusters */
    case 19: case 31: case 41: case 78: case 79: case 80: case 83: case 89: case 90: case 95: case 99: case 102:
    case 115: return 1; /* host mapping, concurrent kernels, unified addresses, priorities, caches, managed memory,
                           cooperative launches, registering, virtual memory, pools */
    default: return 0;  /* fabric handles, multicast, RDMA, textures: not offered */
    }
}
EXPORT int cudaDeviceGetAttribute(int *value, int attribute, int device) {
    if (device < 0 || device >= visible_count()) return fail(INVALID_DEVICE);
    return *value = attribute_of(attribute, device), SUCCESS;
}
EXPORT int cuDeviceGetAttribute(int *value, int attribute, int device) {
    if (device < 0 || device >= visible_count()) return INVALID_DEVICE;
    return *value = attribute_of(attribute, device), SUCCESS;
}

static int blocks_at_once(int threads) {
    const struct card *c = card();
    int warps = (threads + 31) / 32, blocks = warps ? c->threads_per_multiprocessor / (32 * warps) : 1;
    if (blocks > c->blocks_per_multiprocessor) blocks = c->blocks_per_multiprocessor;
    return blocks < 1 ? 1 : blocks;
}
EXPORT int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *f, int threads, size_t shared) {
    return (void)f, (void)shared, *blocks = blocks_at_once(threads), SUCCESS;
}
EXPORT int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *f, int threads, size_t shared,
                                                                  unsigned flags) {
    return (void)f, (void)shared, (void)flags, *blocks = blocks_at_once(threads), SUCCESS;
}
EXPORT int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, void *f, int threads, size_t shared) {
    return (void)f, (void)shared, *blocks = blocks_at_once(threads), SUCCESS;
}
EXPORT int cudaOccupancyMaxActiveClusters(int *clusters, const void *f, const void *config) {
    return (void)f, (void)config, *clusters = card()->multiprocessors, SUCCESS;
}
EXPORT int cuOccupancyMaxActiveClusters(int *clusters, void *f, const void *config) {
    return (void)f, (void)config, *clusters = card()->multiprocessors, SUCCESS;
}

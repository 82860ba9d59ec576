/* NCCL: communicators, and collectives that move the values that are known.
 *
 * Answers: communicators (made, split, shrunk), every collective and point-to-point call, groups, registered buffers,
 * ncclMemAlloc (device memory). A communicator of two ranks and more takes the bytes that the card's table of overheads
 * expects of one. Up to 256 KiB that values.c knows are really sent between the ranks' processes, so barriers wait,
 * objects arrive and counts are added up; of more, nothing is moved, nobody waits, and what is received is not known.
 * A rank that was declared to be alone has no others to wait for: each is taken to give what it gives itself.
 * Does not answer: windows and communicators for kernels (symmetric memory). Reductions of half types and by products
 * are not computed.
 */
#include "virtual_gpu.h"
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { NCCL_SYSTEM_ERROR = 2, NCCL_INVALID_ARGUMENT = 4 };
enum { SUM = 0, MAX = 2, MIN = 3, AVERAGE = 4 };
enum { INT32 = 2, INT64 = 4, FLOAT32 = 7, FLOAT64 = 8 };

struct unique_id {
    char bytes[128];
};
struct communicator {
    int rank, size, device, splits;
    size_t charged;
    char name[128];
    struct post_office *office; /* NULL where all ranks are in this process, or only one rank runs */
};

static int alone;
EXPORT void bigvivit_virtual_gpu_be_alone(void) { alone = 1; }

static size_t size_of_type(int type) {
    static const size_t sizes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};
    return type >= 0 && type < 12 ? sizes[type] : 1;
}

static int make(struct communicator **to, int size, int rank, const char *name) {
    if (rank < 0 || rank >= size) return NCCL_INVALID_ARGUMENT;
    struct communicator *made = calloc(1, sizeof *made);
    if (!made) return NCCL_SYSTEM_ERROR;
    *made = (struct communicator){.rank = rank, .size = size, .device = current_device()};
    made->charged = size > 1 ? card()->communicator : 0;
    if (name) snprintf(made->name, sizeof made->name, "%s", name);
    if (charge(made->device, made->charged) != SUCCESS) {
        free(made);
        return NCCL_SYSTEM_ERROR;
    }
    if (name && size > 1 && !alone && !(made->office = open_post_office(made->name, rank, size))) return NCCL_SYSTEM_ERROR;
    *to = made;
    return 0;
}

EXPORT int ncclGetUniqueId(struct unique_id *id) {
    unsigned char random[12];
    int file = open("/dev/urandom", O_RDONLY | O_CLOEXEC);
    if (file < 0 || read(file, random, sizeof random) != sizeof random) return NCCL_SYSTEM_ERROR;
    close(file);
    memset(id, 0, sizeof *id);
    for (int i = 0; i < 12; i++) sprintf(id->bytes + 2 * i, "%02x", random[i]);
    return 0;
}
EXPORT int ncclCommGetUniqueId(struct communicator *comm, struct unique_id *id) {
    return (void)comm, ncclGetUniqueId(id);
}
EXPORT int ncclCommInitRank(struct communicator **comm, int size, struct unique_id id, int rank) {
    return make(comm, size, rank, id.bytes);
}
EXPORT int ncclCommInitRankConfig(struct communicator **comm, int size, struct unique_id id, int rank, void *config) {
    return (void)config, make(comm, size, rank, id.bytes);
}
EXPORT int ncclCommInitRankScalable(struct communicator **comm, int size, int rank, int ids, struct unique_id *id,
                                    void *config) {
    return (void)ids, (void)config, make(comm, size, rank, id->bytes);
}
EXPORT int ncclCommInitAll(struct communicator **comms, int count, const int *numbers) {
    extern int cudaSetDevice(int);
    int before = current_device(), result = 0;
    for (int i = 0; i < count && !result; i++) {
        cudaSetDevice(numbers ? numbers[i] : i);
        result = make(&comms[i], count, i, NULL);
    }
    cudaSetDevice(before);
    return result;
}
EXPORT int ncclCommDestroy(struct communicator *comm) {
    if (!comm) return 0;
    discharge(comm->device, comm->charged);
    close_post_office(comm->office);
    free(comm);
    return 0;
}
EXPORT int ncclCommAbort(struct communicator *comm) { return ncclCommDestroy(comm); }
EXPORT int ncclCommFinalize(struct communicator *comm) { return (void)comm, 0; }
EXPORT int ncclCommRevoke(struct communicator *comm, int flags) { return (void)comm, (void)flags, 0; }
EXPORT int ncclCommSuspend(struct communicator *comm, int flags) { return (void)comm, (void)flags, 0; }
EXPORT int ncclCommResume(struct communicator *comm) { return (void)comm, 0; }
EXPORT int ncclCommCount(struct communicator *comm, int *count) { return *count = comm->size, 0; }
EXPORT int ncclCommUserRank(struct communicator *comm, int *rank) { return *rank = comm->rank, 0; }
EXPORT int ncclCommCuDevice(struct communicator *comm, int *device) { return *device = comm->device, 0; }
EXPORT int ncclCommGetAsyncError(struct communicator *comm, int *error) { return (void)comm, *error = 0, 0; }
EXPORT const char *ncclGetLastError(struct communicator *comm) { return (void)comm, ""; }
EXPORT int ncclCommMemStats(struct communicator *comm, int what, uint64_t *value) {
    return (void)what, *value = comm->charged, 0;
}

/* Every rank's bytes, in order, those of ranks whose bytes are not known being zero; `known` says whose are. */
static int gather(struct communicator *comm, const char *mine, size_t size, char *all, int *known) {
    if (!comm->office) { /* each other rank gives what this one gives */
        for (int rank = 0; rank < comm->size; rank++) {
            known[rank] = mine != NULL;
            if (mine) memcpy(all + (size_t)rank * size, mine, size);
        }
        return 0;
    }
    for (int to = 0; to < comm->size; to++)
        if (to != comm->rank && !send_message(comm->office, to, mine, (int64_t)size)) return NCCL_SYSTEM_ERROR;
    for (int from = 0; from < comm->size; from++) {
        char *place = all + (size_t)from * size;
        memset(place, 0, size);
        known[from] = mine != NULL;
        if (from == comm->rank && mine) memcpy(place, mine, size);
        if (from != comm->rank && !receive_message(comm->office, from, place, (int64_t)size, &known[from]))
            return NCCL_SYSTEM_ERROR;
    }
    return 0;
}

/* Values if any are known, the others zero, else NULL; the caller frees them. */
static char *known_values(const void *address, size_t size) {
    char *bytes = malloc(size ? size : 1);
    if (bytes && get_values((uint64_t)address, bytes, size)) return bytes;
    free(bytes);
    return NULL;
}

EXPORT int ncclCommSplit(struct communicator *parent, int colour, int key, struct communicator **made, void *config) {
    (void)config;
    char name[128];
    int mine[2] = {colour, key}, size = 0, rank = 0;
    int (*all)[2] = calloc((size_t)parent->size, sizeof *all), *known = calloc((size_t)parent->size, sizeof *known);
    *made = NULL;
    if (!all || !known) return NCCL_SYSTEM_ERROR;
    if (parent->office && gather(parent, (char *)mine, sizeof mine, (char *)all, known)) return NCCL_SYSTEM_ERROR;
    for (int each = 0; each < parent->size; each++) {
        if (all[each][0] != colour) continue;
        size++;
        rank += all[each][1] < key || (all[each][1] == key && each < parent->rank);
    }
    free(all);
    free(known);
    snprintf(name, sizeof name, "%.90s-%d-%d", parent->name, parent->splits++, colour);
    if (colour < 0) return 0;
    return parent->office ? make(made, size, rank, name) : make(made, parent->size, parent->rank, NULL);
}
EXPORT int ncclCommShrink(struct communicator *parent, int *excluded, int count, struct communicator **made, void *config,
                          int flags) {
    (void)config, (void)flags;
    int before = 0;
    for (int i = 0; i < count; i++) before += excluded[i] < parent->rank;
    char name[128];
    snprintf(name, sizeof name, "%.90s-shrunk-%d", parent->name, parent->splits++);
    return make(made, parent->size - count, parent->rank - before, parent->office ? name : NULL);
}

EXPORT int ncclAllGather(const void *from, void *to, size_t n, int type, struct communicator *comm, void *stream) {
    size_t size = n * size_of_type(type);
    uint64_t target = (uint64_t)to;
    int result = 0;
    count_captured_node(stream);
    char *mine = fits_message(size) ? known_values(from, size) : NULL;
    if (comm->office && fits_message(size)) {
        char *all = malloc((size_t)comm->size * size + 1);
        int *known = calloc((size_t)comm->size, sizeof *known);
        result = all && known ? gather(comm, mine, size, all, known) : NCCL_SYSTEM_ERROR;
        for (int rank = 0; !result && rank < comm->size; rank++) {
            if (known[rank]) set_values(target + (size_t)rank * size, all + (size_t)rank * size, size);
            else forget_values(target + (size_t)rank * size, size);
        }
        free(all);
        free(known);
    } else {
        forget_values(target, (size_t)comm->size * size);
        /* One process for all ranks, or one rank: every rank gives what this one gives. */
        for (int rank = 0; mine && !comm->office && rank < comm->size; rank++)
            copy_values(target + (size_t)rank * size, (uint64_t)from, size);
    }
    free(mine);
    return result;
}

#define COMBINE(type)                                                                          \
    for (size_t i = 0; i < n; i++) {                                                           \
        type *to = (type *)total + i, value = ((const type *)more)[i];                         \
        *to = op == MAX ? (value > *to ? value : *to) : op == MIN ? (value < *to ? value : *to) : *to + value; \
    }
#define DIVIDE(type) \
    for (size_t i = 0; i < n; i++) ((type *)total)[i] /= (type)ranks;
static void combine(int type, int op, char *total, const char *more, size_t n) {
    if (type == INT32) COMBINE(int32_t)
    else if (type == INT64) COMBINE(int64_t)
    else if (type == FLOAT32) COMBINE(float)
    else COMBINE(double)
}
static void divide(int type, char *total, size_t n, int ranks) {
    if (type == INT32) DIVIDE(int32_t)
    else if (type == INT64) DIVIDE(int64_t)
    else if (type == FLOAT32) DIVIDE(float)
    else DIVIDE(double)
}

EXPORT int ncclAllReduce(const void *from, void *to, size_t n, int type, int op, struct communicator *comm, void *stream) {
    size_t size = n * size_of_type(type);
    count_captured_node(stream);
    int computed = (type == INT32 || type == INT64 || type == FLOAT32 || type == FLOAT64) &&
                   (op == SUM || op == MAX || op == MIN || op == AVERAGE);
    if (comm->size == 1 || (!comm->office && !computed)) return copy_values((uint64_t)to, (uint64_t)from, size), 0;
    if (!fits_message(size)) return forget_values((uint64_t)to, size), 0;
    char *mine = known_values(from, size), *all = malloc((size_t)comm->size * size + 1);
    int *known = calloc((size_t)comm->size, sizeof *known);
    int result = all && known ? gather(comm, mine, size, all, known) : NCCL_SYSTEM_ERROR;
    for (int rank = 0; !result && rank < comm->size; rank++) computed = computed && known[rank];
    if (!result && computed) {
        for (int rank = 1; rank < comm->size; rank++) combine(type, op, all, all + (size_t)rank * size, n);
        if (op == AVERAGE) divide(type, all, n, comm->size);
        set_values((uint64_t)to, all, size);
    } else {
        forget_values((uint64_t)to, size);
    }
    free(mine);
    free(all);
    free(known);
    return result;
}
EXPORT int ncclReduce(const void *from, void *to, size_t n, int type, int op, int root, struct communicator *comm,
                      void *stream) {
    (void)from, (void)op;
    count_captured_node(stream);
    if (comm->rank == root) forget_values((uint64_t)to, n * size_of_type(type));
    return 0;
}
EXPORT int ncclReduceScatter(const void *from, void *to, size_t n, int type, int op, struct communicator *comm, void *s) {
    (void)from, (void)op, (void)comm;
    return count_captured_node(s), forget_values((uint64_t)to, n * size_of_type(type)), 0;
}
EXPORT int ncclAlltoAll(const void *from, void *to, size_t n, int type, struct communicator *comm, void *stream) {
    (void)from;
    count_captured_node(stream);
    return forget_values((uint64_t)to, n * size_of_type(type) * (size_t)comm->size), 0;
}
EXPORT int ncclGather(const void *from, void *to, size_t n, int type, int root, struct communicator *comm, void *stream) {
    (void)from;
    count_captured_node(stream);
    if (comm->rank == root) forget_values((uint64_t)to, n * size_of_type(type) * (size_t)comm->size);
    return 0;
}
EXPORT int ncclScatter(const void *from, void *to, size_t n, int type, int root, struct communicator *comm, void *stream) {
    (void)from, (void)root, (void)comm;
    return count_captured_node(stream), forget_values((uint64_t)to, n * size_of_type(type)), 0;
}

/* Point to point. What is to be received inside a group waits for the group's end, when all is sent. */
struct receipt {
    void *to;
    size_t size;
    int peer;
    struct communicator *comm;
    struct receipt *next;
};
static __thread struct receipt *receipts, **last_receipt = NULL;
static __thread int groups;

static int send_values(const void *from, size_t size, int peer, struct communicator *comm) {
    if (!comm->office || peer == comm->rank || !fits_message(size)) return 0;
    char *bytes = known_values(from, size);
    int sent = send_message(comm->office, peer, bytes, (int64_t)size);
    free(bytes);
    return sent ? 0 : NCCL_SYSTEM_ERROR;
}
static int receive_values(void *to, size_t size, int peer, struct communicator *comm) {
    int known = 0, received = 1;
    char *bytes = malloc(size + 1);
    if (!bytes) return NCCL_SYSTEM_ERROR;
    if (comm->office && peer != comm->rank && fits_message(size))
        received = receive_message(comm->office, peer, bytes, (int64_t)size, &known);
    if (known) set_values((uint64_t)to, bytes, size);
    else forget_values((uint64_t)to, size);
    free(bytes);
    return received ? 0 : NCCL_SYSTEM_ERROR;
}
EXPORT int ncclGroupStart(void) { return groups++, 0; }
EXPORT int ncclGroupEnd(void) {
    int result = 0;
    if (--groups > 0) return 0;
    while (receipts) {
        struct receipt *first = receipts;
        receipts = first->next;
        if (!result) result = receive_values(first->to, first->size, first->peer, first->comm);
        free(first);
    }
    return result;
}
EXPORT int ncclGroupSimulateEnd(void *info) { return (void)info, ncclGroupEnd(); }
EXPORT int ncclSend(const void *from, size_t n, int type, int peer, struct communicator *comm, void *stream) {
    count_captured_node(stream);
    return send_values(from, n * size_of_type(type), peer, comm);
}
EXPORT int ncclRecv(void *to, size_t n, int type, int peer, struct communicator *comm, void *stream) {
    count_captured_node(stream);
    if (!groups) return receive_values(to, n * size_of_type(type), peer, comm);
    struct receipt *made = malloc(sizeof *made);
    if (!made) return NCCL_SYSTEM_ERROR;
    *made = (struct receipt){to, n * size_of_type(type), peer, comm, NULL};
    if (receipts) *last_receipt = made;
    else receipts = made;
    last_receipt = &made->next;
    return 0;
}
EXPORT int ncclBroadcast(const void *from, void *to, size_t n, int type, int root, struct communicator *comm, void *s) {
    size_t size = n * size_of_type(type);
    count_captured_node(s);
    if (comm->rank != root) return comm->office ? receive_values(to, size, root, comm) : 0;
    int result = 0;
    for (int rank = 0; comm->office && rank < comm->size && !result; rank++) result = send_values(from, size, rank, comm);
    if (to != from) copy_values((uint64_t)to, (uint64_t)from, size);
    return result;
}
EXPORT int ncclBcast(void *buffer, size_t n, int type, int root, struct communicator *comm, void *stream) {
    return ncclBroadcast(buffer, buffer, n, type, root, comm, stream);
}

EXPORT int ncclRedOpCreatePreMulSum(int *op, void *scalar, int type, int residence, struct communicator *comm) {
    return (void)scalar, (void)type, (void)residence, (void)comm, *op = 5, 0;
}
EXPORT int ncclRedOpDestroy(int op, struct communicator *comm) { return (void)op, (void)comm, 0; }
EXPORT int ncclMemAlloc(void **to, size_t size) {
    extern int cudaMalloc(void **, size_t);
    return cudaMalloc(to, size) == SUCCESS ? 0 : 1;
}
EXPORT int ncclMemFree(void *pointer) {
    extern int cudaFree(void *);
    return cudaFree(pointer) == SUCCESS ? 0 : 1;
}
EXPORT int ncclCommRegister(struct communicator *comm, void *buffer, size_t size, void **handle) {
    return (void)comm, (void)size, *handle = buffer, 0;
}
EXPORT int ncclCommDeregister(struct communicator *comm, void *handle) { return (void)comm, (void)handle, 0; }

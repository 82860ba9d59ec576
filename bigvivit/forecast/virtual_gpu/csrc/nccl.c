/* NCCL: collectives that return at once, with nothing moved.
 *
 * Answers: communicators (made, split, shrunk, with rank, size and device), every collective and point-to-point call,
 * groups, registered buffers, ncclMemAlloc (device memory). A communicator of two ranks and more takes the bytes that
 * the card's table of overheads expects of one.
 * Ranks do not wait for one another here, and what they receive is whatever a device reads as: zero.
 * Does not answer: windows and communicators for kernels (symmetric memory).
 */
#include "virtual_gpu.h"
#include <stdlib.h>
#include <string.h>

struct communicator {
    int rank, size, device;
    size_t charged;
};
enum { NCCL_SYSTEM_ERROR = 2, NCCL_INVALID_ARGUMENT = 4 };
struct unique_id {
    char bytes[128];
};

static int make(struct communicator **to, int size, int rank) {
    if (rank < 0 || rank >= size) return NCCL_INVALID_ARGUMENT;
    struct communicator *made = calloc(1, sizeof *made);
    if (!made) return NCCL_SYSTEM_ERROR;
    *made = (struct communicator){rank, size, current_device(), size > 1 ? card()->communicator : 0};
    if (charge(made->device, made->charged) != SUCCESS) {
        free(made);
        return NCCL_SYSTEM_ERROR;
    }
    *to = made;
    return 0;
}

EXPORT int ncclGetUniqueId(struct unique_id *id) {
    memset(id, 0, sizeof *id);
    memcpy(id->bytes, "virtual", 8);
    return 0;
}
EXPORT int ncclCommGetUniqueId(struct communicator *comm, struct unique_id *id) {
    return (void)comm, ncclGetUniqueId(id);
}
EXPORT int ncclCommInitRank(struct communicator **comm, int size, struct unique_id id, int rank) {
    return (void)id, make(comm, size, rank);
}
EXPORT int ncclCommInitRankConfig(struct communicator **comm, int size, struct unique_id id, int rank, void *config) {
    return (void)id, (void)config, make(comm, size, rank);
}
EXPORT int ncclCommInitRankScalable(struct communicator **comm, int size, int rank, int ids, struct unique_id *id,
                                    void *config) {
    return (void)ids, (void)id, (void)config, make(comm, size, rank);
}
EXPORT int ncclCommInitAll(struct communicator **comms, int count, const int *numbers) {
    extern int cudaSetDevice(int);
    int before = current_device(), result = 0;
    for (int i = 0; i < count && !result; i++) {
        cudaSetDevice(numbers ? numbers[i] : i);
        result = make(&comms[i], count, i);
    }
    cudaSetDevice(before);
    return result;
}
/* How many ranks share a colour is not known here: the group is taken to be as large as its parent. */
EXPORT int ncclCommSplit(struct communicator *parent, int colour, int key, struct communicator **made, void *config) {
    (void)key, (void)config;
    *made = NULL;
    return colour < 0 ? 0 : make(made, parent->size, parent->rank);
}
EXPORT int ncclCommShrink(struct communicator *parent, int *excluded, int count, struct communicator **made, void *config,
                          int flags) {
    (void)config, (void)flags;
    int before = 0;
    for (int i = 0; i < count; i++) before += excluded[i] < parent->rank;
    return make(made, parent->size - count, parent->rank - before);
}
EXPORT int ncclCommDestroy(struct communicator *comm) {
    if (comm) discharge(comm->device, comm->charged);
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

EXPORT int ncclGroupStart(void) { return 0; }
EXPORT int ncclGroupEnd(void) { return 0; }
EXPORT int ncclGroupSimulateEnd(void *info) { return (void)info, 0; }
EXPORT int ncclAllReduce(const void *from, void *to, size_t n, int type, int op, struct communicator *comm, void *stream) {
    return (void)from, (void)to, (void)n, (void)type, (void)op, (void)comm, count_captured_node(stream), 0;
}
EXPORT int ncclReduce(const void *from, void *to, size_t n, int type, int op, int root, struct communicator *comm,
                      void *stream) {
    return (void)root, ncclAllReduce(from, to, n, type, op, comm, stream);
}
EXPORT int ncclReduceScatter(const void *from, void *to, size_t n, int type, int op, struct communicator *comm, void *s) {
    return ncclAllReduce(from, to, n, type, op, comm, s);
}
EXPORT int ncclAllGather(const void *from, void *to, size_t n, int type, struct communicator *comm, void *stream) {
    return ncclAllReduce(from, to, n, type, 0, comm, stream);
}
EXPORT int ncclAlltoAll(const void *from, void *to, size_t n, int type, struct communicator *comm, void *stream) {
    return ncclAllReduce(from, to, n, type, 0, comm, stream);
}
EXPORT int ncclGather(const void *from, void *to, size_t n, int type, int root, struct communicator *comm, void *stream) {
    return (void)root, ncclAllReduce(from, to, n, type, 0, comm, stream);
}
EXPORT int ncclScatter(const void *from, void *to, size_t n, int type, int root, struct communicator *comm, void *stream) {
    return (void)root, ncclAllReduce(from, to, n, type, 0, comm, stream);
}
EXPORT int ncclBroadcast(const void *from, void *to, size_t n, int type, int root, struct communicator *comm, void *s) {
    return (void)root, ncclAllReduce(from, to, n, type, 0, comm, s);
}
EXPORT int ncclBcast(void *buffer, size_t n, int type, int root, struct communicator *comm, void *stream) {
    return (void)root, ncclAllReduce(buffer, buffer, n, type, 0, comm, stream);
}
EXPORT int ncclSend(const void *from, size_t n, int type, int peer, struct communicator *comm, void *stream) {
    return (void)peer, ncclAllReduce(from, NULL, n, type, 0, comm, stream);
}
EXPORT int ncclRecv(void *to, size_t n, int type, int peer, struct communicator *comm, void *stream) {
    return (void)peer, ncclAllReduce(NULL, to, n, type, 0, comm, stream);
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

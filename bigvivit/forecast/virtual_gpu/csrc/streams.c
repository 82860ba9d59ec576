/* Streams, events and graphs. Everything asked for is done at once, in the caller's thread.
 *
 * Answers: streams with priorities, events (complete as soon as they are recorded; a millisecond lies between any two),
 * waiting, host functions, capture of a stream and of those that join it by events, graphs that count their nodes and
 * do nothing when launched. What a real capture forbids (waiting for a captured stream) is refused here too.
 * Does not answer: conditional nodes, memory nodes of graphs, updates of an instantiated graph.
 * bigvivit_virtual_gpu_hold_events(1) makes every event incomplete: blocks that a stream still uses then stay taken.
 */
#include "virtual_gpu.h"
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

struct capture {
    unsigned long long id;
    size_t nodes;
    int references; /* streams and events that are of it, and the graph made of it */
};
struct stream {
    int device, priority;
    unsigned flags;
    struct capture *capture; /* NULL where nothing is captured */
    int origin;              /* whether the capture began here */
    struct stream *next;
};
struct event {
    int recorded;
    struct capture *capture;
};
struct graph {
    size_t nodes;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct stream defaults[3]; /* handles 0, 1 (legacy) and 2 (of the thread) */
static struct stream *streams;
static unsigned long long captures;
static int held;

EXPORT void bigvivit_virtual_gpu_hold_events(int hold) { held = hold; }

static struct stream *stream_of(void *handle) {
    return (uintptr_t)handle < 3 ? &defaults[(uintptr_t)handle] : handle;
}
int stream_captures(void *handle) { return stream_of(handle)->capture != NULL; }
int stream_may_wait(void *handle) { return stream_captures(handle) ? fail(CAPTURE_UNSUPPORTED) : SUCCESS; }
void count_captured_node(void *handle) {
    struct capture *capture = stream_of(handle)->capture;
    if (capture) __atomic_add_fetch(&capture->nodes, 1, __ATOMIC_RELAXED);
}

EXPORT int cudaStreamCreateWithPriority(void **handle, unsigned flags, int priority) {
    struct stream *made = calloc(1, sizeof *made);
    if (!made) return fail(OUT_OF_MEMORY);
    touch(current_device());
    *made = (struct stream){.device = current_device(), .priority = priority, .flags = flags};
    pthread_mutex_lock(&lock);
    made->next = streams;
    streams = made;
    pthread_mutex_unlock(&lock);
    *handle = made;
    return SUCCESS;
}
EXPORT int cudaStreamCreate(void **handle) { return cudaStreamCreateWithPriority(handle, 0, 0); }
EXPORT int cudaStreamCreateWithFlags(void **handle, unsigned flags) {
    return cudaStreamCreateWithPriority(handle, flags, 0);
}
EXPORT int cudaStreamDestroy(void *handle) {
    pthread_mutex_lock(&lock);
    for (struct stream **at = &streams; *at; at = &(*at)->next)
        if (*at == handle) {
            *at = (*at)->next;
            free(handle);
            break;
        }
    pthread_mutex_unlock(&lock);
    return SUCCESS;
}
EXPORT int cudaStreamGetPriority(void *handle, int *priority) { return *priority = stream_of(handle)->priority, 0; }
EXPORT int cudaStreamGetFlags(void *handle, unsigned *flags) { return *flags = stream_of(handle)->flags, SUCCESS; }
EXPORT int cudaStreamGetDevice(void *handle, int *device) {
    *device = (uintptr_t)handle < 3 ? current_device() : stream_of(handle)->device;
    return SUCCESS;
}
EXPORT int cudaStreamGetId(void *handle, unsigned long long *id) { return *id = (uintptr_t)handle, SUCCESS; }
EXPORT int cudaStreamQuery(void *handle) { return stream_may_wait(handle); }
EXPORT int cudaStreamSynchronize(void *handle) { return stream_may_wait(handle); }
EXPORT int cudaStreamAttachMemAsync(void *handle, void *p, size_t n, unsigned f) {
    return (void)handle, (void)p, (void)n, (void)f, SUCCESS;
}
EXPORT int cudaLaunchHostFunc(void *handle, void (*function)(void *), void *data) {
    if (stream_captures(handle)) return count_captured_node(handle), SUCCESS;
    function(data);
    return SUCCESS;
}
EXPORT int cudaStreamAddCallback(void *handle, void (*function)(void *, int, void *), void *data, unsigned flags) {
    (void)flags;
    function(handle, SUCCESS, data);
    return SUCCESS;
}

/* Events */
EXPORT int cudaEventCreateWithFlags(void **handle, unsigned flags) {
    (void)flags;
    touch(current_device());
    *handle = calloc(1, sizeof(struct event));
    return *handle ? SUCCESS : fail(OUT_OF_MEMORY);
}
EXPORT int cudaEventCreate(void **handle) { return cudaEventCreateWithFlags(handle, 0); }
EXPORT int cudaEventDestroy(void *handle) {
    free(handle);
    return SUCCESS;
}
EXPORT int cudaEventRecordWithFlags(void *handle, void *stream, unsigned flags) {
    (void)flags;
    struct event *event = handle;
    event->recorded = 1;
    event->capture = stream_of(stream)->capture;
    return SUCCESS;
}
EXPORT int cudaEventRecord(void *handle, void *stream) { return cudaEventRecordWithFlags(handle, stream, 0); }
EXPORT int cudaEventQuery(void *handle) { return held && ((struct event *)handle)->recorded ? NOT_READY : SUCCESS; }
EXPORT int cudaEventSynchronize(void *handle) { return (void)handle, SUCCESS; }
EXPORT int cudaEventElapsedTime(float *milliseconds, void *from, void *to) {
    if (!((struct event *)from)->recorded || !((struct event *)to)->recorded) return fail(INVALID_HANDLE);
    return *milliseconds = 1, SUCCESS;
}
EXPORT int cudaEventElapsedTime_v2(float *ms, void *from, void *to) { return cudaEventElapsedTime(ms, from, to); }
EXPORT int cudaStreamWaitEvent(void *handle, void *waited, unsigned flags) {
    (void)flags;
    struct event *event = waited;
    struct stream *stream = stream_of(handle);
    if (event && event->capture && !stream->capture) stream->capture = event->capture; /* it joins */
    return SUCCESS;
}

/* Capture. A capture lives on after its end, since events may still name it. */
EXPORT int cudaStreamBeginCapture(void *handle, int mode) {
    (void)mode;
    struct stream *stream = stream_of(handle);
    if (stream->capture || !handle) return fail(CAPTURE_UNSUPPORTED);
    struct capture *capture = calloc(1, sizeof *capture);
    if (!capture) return fail(OUT_OF_MEMORY);
    capture->id = __atomic_add_fetch(&captures, 1, __ATOMIC_RELAXED);
    stream->capture = capture;
    stream->origin = 1;
    return SUCCESS;
}
EXPORT int cudaStreamEndCapture(void *handle, void **graph) {
    struct stream *stream = stream_of(handle);
    struct capture *ended = stream->capture;
    if (!ended || !stream->origin) return fail(CAPTURE_UNMATCHED);
    pthread_mutex_lock(&lock);
    for (struct stream *each = streams; each; each = each->next)
        if (each->capture == ended) each->capture = NULL, each->origin = 0;
    pthread_mutex_unlock(&lock);
    struct graph *made = calloc(1, sizeof *made);
    if (!made) return fail(OUT_OF_MEMORY);
    made->nodes = ended->nodes;
    *graph = made;
    return SUCCESS;
}
EXPORT int cudaStreamIsCapturing(void *handle, int *status) { return *status = stream_captures(handle), SUCCESS; }
static int capture_info(void *handle, int *status, unsigned long long *id, void **graph, const void ***nodes,
                        size_t *count) {
    struct capture *capture = stream_of(handle)->capture;
    *status = capture != NULL;
    if (id) *id = capture ? capture->id : 0;
    if (graph) *graph = capture;
    if (nodes) *nodes = NULL;
    if (count) *count = 0;
    return SUCCESS;
}
EXPORT int cudaStreamGetCaptureInfo_v2(void *handle, int *status, unsigned long long *id, void **graph,
                                       const void ***nodes, size_t *count) {
    return capture_info(handle, status, id, graph, nodes, count);
}
EXPORT int cudaStreamGetCaptureInfo_v3(void *handle, int *status, unsigned long long *id, void **graph,
                                       const void ***nodes, const void **edges, size_t *count) {
    if (edges) *edges = NULL;
    return capture_info(handle, status, id, graph, nodes, count);
}
#if CUDA_MAJOR >= 13
EXPORT int cudaStreamGetCaptureInfo(void *handle, int *status, unsigned long long *id, void **graph,
                                    const void ***nodes, const void **edges, size_t *count) {
    return cudaStreamGetCaptureInfo_v3(handle, status, id, graph, nodes, edges, count);
}
#endif
EXPORT int cudaThreadExchangeStreamCaptureMode(int *mode) {
    static __thread int current; /* cudaStreamCaptureModeGlobal */
    int before = current;
    current = *mode;
    *mode = before;
    return SUCCESS;
}

/* Graphs */
EXPORT int cudaGraphCreate(void **graph, unsigned flags) {
    (void)flags;
    return (*graph = calloc(1, sizeof(struct graph))) ? SUCCESS : fail(OUT_OF_MEMORY);
}
EXPORT int cudaGraphGetNodes(void *graph, void **nodes, size_t *count) {
    if (nodes)
        for (size_t i = 0; i < *count; i++) nodes[i] = NULL;
    *count = ((struct graph *)graph)->nodes;
    return SUCCESS;
}
#if CUDA_MAJOR >= 13
EXPORT int cudaGraphNodeGetDependencies(void *node, void **nodes, void *edges, size_t *count) {
    return (void)node, (void)nodes, (void)edges, *count = 0, SUCCESS;
}
#else
EXPORT int cudaGraphNodeGetDependencies(void *node, void **nodes, size_t *count) {
    return (void)node, (void)nodes, *count = 0, SUCCESS;
}
#endif
EXPORT int cudaGraphInstantiateWithFlags(void **executable, void *graph, unsigned long long flags) {
    (void)graph, (void)flags;
    return (*executable = calloc(1, 1)) ? SUCCESS : fail(OUT_OF_MEMORY);
}
EXPORT int cudaGraphInstantiate(void **executable, void *graph, unsigned long long flags) {
    return cudaGraphInstantiateWithFlags(executable, graph, flags);
}
EXPORT int cudaGraphUpload(void *executable, void *stream) { return (void)executable, (void)stream, SUCCESS; }
EXPORT int cudaGraphLaunch(void *executable, void *stream) {
    (void)executable;
    count_captured_node(stream);
    return SUCCESS;
}
EXPORT int cudaGraphDestroy(void *graph) {
    free(graph);
    return SUCCESS;
}
EXPORT int cudaGraphExecDestroy(void *executable) {
    free(executable);
    return SUCCESS;
}
EXPORT int cudaGraphRetainUserObject(void *graph, void *object, unsigned count, unsigned flags) {
    return (void)graph, (void)object, (void)count, (void)flags, SUCCESS;
}
EXPORT int cudaGraphDebugDotPrint(void *graph, const char *path, unsigned flags) {
    return (void)graph, (void)path, (void)flags, fail(NOT_SUPPORTED);
}
/* Objects that a graph keeps alive: kept to the end, as a graph that is never destroyed would. */
EXPORT int cudaUserObjectCreate(void **object, void *data, void (*destroy)(void *), unsigned count, unsigned flags) {
    (void)data, (void)destroy, (void)count, (void)flags;
    return (*object = calloc(1, 1)) ? SUCCESS : fail(OUT_OF_MEMORY);
}
EXPORT int cudaUserObjectRelease(void *object, unsigned count) { return (void)object, (void)count, SUCCESS; }
EXPORT int cudaDeviceGetGraphMemAttribute(int device, int attribute, void *value) {
    (void)device, (void)attribute;
    *(uint64_t *)value = 0;
    return SUCCESS;
}
EXPORT int cudaDeviceSetGraphMemAttribute(int device, int attribute, void *value) {
    return (void)device, (void)attribute, (void)value, SUCCESS;
}
EXPORT int cudaDeviceGraphMemTrim(int device) { return (void)device, SUCCESS; }

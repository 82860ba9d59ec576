/* cuDNN: convolutions, batch normalisation and attention, each by an engine that wants no workspace.
 *
 * Answers: the backend interface (descriptors that keep what they are given, one engine for every graph), the older
 * convolution calls, batch normalisation, pooling.
 * What a real cuDNN would ask as workspace and reserve is its own secret and taken to be none: outputs, gradients and
 * what autograd keeps are exact, scratch of convolutions and of cuDNN's attention is missing.
 * Recurrent networks are in recurrent.c.
 * Does not answer: connectionist temporal classification, spatial transformers: by name.
 * Versions and error texts come from the real library, which needs no device for them.
 */
#include "virtual_gpu.h"
#include <stdlib.h>
#include <string.h>

EXPORT int cudnnCreate(struct cudnn **handle) {
    touch(current_device());
    return (*handle = calloc(1, sizeof **handle)) ? 0 : CUDNN_INTERNAL_ERROR;
}
EXPORT int cudnnDestroy(struct cudnn *handle) { return free(handle), 0; }
EXPORT int cudnnSetStream(struct cudnn *handle, void *stream) { return handle->stream = stream, 0; }
EXPORT int cudnnGetStream(struct cudnn *handle, void **stream) { return *stream = handle->stream, 0; }

/* The backend interface */
enum { ENGINE_HEURISTICS_RESULTS = 202, ENGINE_OF_CONFIGURATION = 300, CONFIGURATION_WORKSPACE = 303 };
enum { CONFIGURATION_SHARED_MEMORY = 304, PLAN_WORKSPACE = 402, ENGINE_INDEX = 1301 };
enum { TYPE_INT64 = 3, TYPE_DESCRIPTOR = 15 };

struct attribute {
    int name, type;
    int64_t count;
    struct attribute *next;
    char bytes[];
};
struct descriptor {
    int type;
    struct attribute *attributes;
};

static size_t size_of_type(int type) {
    switch (type) {
    case 0: case TYPE_INT64: case 5: case 6: case TYPE_DESCRIPTOR: return 8; /* handle, double, pointer */
    case 2: case 24: return 1;                                               /* boolean, character */
    case 26: return 16;                                                      /* fraction */
    default: return 4;                                                       /* float, int32, enumerations */
    }
}

EXPORT int cudnnBackendCreateDescriptor(int type, struct descriptor **to) {
    if (!(*to = calloc(1, sizeof **to))) return CUDNN_INTERNAL_ERROR;
    (*to)->type = type;
    return 0;
}
EXPORT int cudnnBackendDestroyDescriptor(struct descriptor *descriptor) {
    while (descriptor && descriptor->attributes) {
        struct attribute *next = descriptor->attributes->next;
        free(descriptor->attributes);
        descriptor->attributes = next;
    }
    free(descriptor);
    return 0;
}
EXPORT int cudnnBackendInitialize(struct descriptor *descriptor) { return (void)descriptor, 0; }
EXPORT int cudnnBackendFinalize(struct descriptor *descriptor) { return (void)descriptor, 0; }
EXPORT int cudnnBackendSetAttribute(struct descriptor *to, int name, int type, int64_t count, const void *from) {
    size_t bytes = (size_t)count * size_of_type(type);
    struct attribute *kept = malloc(sizeof *kept + bytes);
    if (!kept) return CUDNN_INTERNAL_ERROR;
    *kept = (struct attribute){name, type, count, to->attributes};
    if (bytes) memcpy(kept->bytes, from, bytes);
    to->attributes = kept; /* before an older one of the same name */
    return 0;
}
EXPORT int cudnnBackendGetAttribute(struct descriptor *const from, int name, int type, int64_t wanted, int64_t *count,
                                    void *to) {
    int64_t answered = 0;
    if (name == ENGINE_HEURISTICS_RESULTS || name == ENGINE_OF_CONFIGURATION) {
        answered = 1; /* the caller's own descriptors are filled in, with nothing */
    } else if (name == CONFIGURATION_WORKSPACE || name == CONFIGURATION_SHARED_MEMORY || name == PLAN_WORKSPACE ||
               name == ENGINE_INDEX) {
        if (wanted > 0 && to) memset(to, 0, size_of_type(type));
        answered = 1;
    } else {
        for (struct attribute *each = from->attributes; each; each = each->next) {
            if (each->name != name || each->type != type) continue;
            int64_t given = wanted < each->count ? wanted : each->count;
            if (to && given > 0) memcpy(to, each->bytes, (size_t)given * size_of_type(type));
            answered = each->count;
            break;
        }
    }
    if (count) *count = answered;
    return 0;
}
EXPORT int cudnnBackendExecute(struct cudnn *handle, struct descriptor *plan, struct descriptor *pack) {
    (void)plan, (void)pack;
    count_captured_node(handle->stream);
    return 0;
}

/* Older descriptors. Of tensors' the shapes are read again. */
EXPORT int cudnnCreateTensorDescriptor(struct shape **to) {
    return (*to = calloc(1, sizeof **to)) ? 0 : CUDNN_INTERNAL_ERROR;
}
EXPORT int cudnnDestroyTensorDescriptor(struct shape *shape) { return free(shape), 0; }
EXPORT int cudnnSetTensorNdDescriptor(struct shape *shape, int type, int count, const int *sizes, const int *strides) {
    if (count < 0 || count > 8) return CUDNN_BAD_PARAM;
    *shape = (struct shape){.type = type, .count = count};
    memcpy(shape->sizes, sizes, (size_t)count * sizeof *sizes);
    memcpy(shape->strides, strides, (size_t)count * sizeof *strides);
    return 0;
}
EXPORT int cudnnGetTensorNdDescriptor(const struct shape *shape, int wanted, int *type, int *count, int *sizes,
                                      int *strides) {
    int given = wanted < shape->count ? wanted : shape->count;
    *type = shape->type, *count = shape->count;
    memcpy(sizes, shape->sizes, (size_t)given * sizeof *sizes);
    memcpy(strides, shape->strides, (size_t)given * sizeof *strides);
    return 0;
}
#define DESCRIPTOR(name)                                                                           \
    EXPORT int cudnnCreate##name##Descriptor(void **to) {                                          \
        return (*to = calloc(1, 1)) ? 0 : CUDNN_INTERNAL_ERROR;                                    \
    }                                                                                              \
    EXPORT int cudnnDestroy##name##Descriptor(void *descriptor) { return free(descriptor), 0; }
DESCRIPTOR(Filter)
DESCRIPTOR(Convolution)
DESCRIPTOR(Activation)
DESCRIPTOR(Pooling)
#define DONE(name) \
    EXPORT int name(void) { return 0; }
DONE(cudnnSetFilterNdDescriptor)
DONE(cudnnSetConvolutionNdDescriptor)
DONE(cudnnSetConvolutionGroupCount)
DONE(cudnnSetConvolutionMathType)
DONE(cudnnSetActivationDescriptor)
DONE(cudnnSetPooling2dDescriptor)

#define WORK(name)                           \
    EXPORT int name(struct cudnn *handle) { \
        count_captured_node(handle->stream); \
        return 0;                            \
    }
WORK(cudnnConvolutionForward)
WORK(cudnnConvolutionBiasActivationForward)
WORK(cudnnConvolutionBackwardData)
WORK(cudnnConvolutionBackwardFilter)
WORK(cudnnBatchNormalizationForwardTrainingEx)
WORK(cudnnBatchNormalizationForwardInference)
WORK(cudnnBatchNormalizationBackwardEx)
WORK(cudnnPoolingForward)

/* The older way to choose an algorithm: there is one, without a workspace. */
struct performance { /* cudnnConvolution*AlgoPerf_t */
    int algorithm, status;
    float time;
    size_t memory;
    int determinism, math_type, reserved[3];
};
static int choose(int wanted, int *returned, struct performance *found) {
    if (wanted < 1) return CUDNN_BAD_PARAM;
    *returned = 1;
    *found = (struct performance){.algorithm = 1, .determinism = 1};
    return 0;
}
#define CHOICE(kind)                                                                                                \
    EXPORT int cudnnGetConvolution##kind##Algorithm_v7(void *h, void *x, void *w, void *c, void *y, int wanted,     \
                                                       int *returned, struct performance *found) {                  \
        return (void)h, (void)x, (void)w, (void)c, (void)y, choose(wanted, returned, found);                        \
    }                                                                                                               \
    EXPORT int cudnnFindConvolution##kind##AlgorithmEx(void *h, void *dx, void *x, void *dw, void *w, void *c,      \
                                                       void *dy, void *y, int wanted, int *returned,                \
                                                       struct performance *found, void *space, size_t size) {       \
        (void)h, (void)dx, (void)x, (void)dw, (void)w, (void)c, (void)dy, (void)y, (void)space, (void)size;         \
        return choose(wanted, returned, found);                                                                     \
    }                                                                                                               \
    EXPORT int cudnnGetConvolution##kind##WorkspaceSize(void *h, void *x, void *w, void *c, void *y, int algorithm, \
                                                        size_t *size) {                                             \
        return (void)h, (void)x, (void)w, (void)c, (void)y, (void)algorithm, *size = 0, 0;                          \
    }
CHOICE(Forward)
CHOICE(BackwardData)
CHOICE(BackwardFilter)

/* Sizes of batch normalisation: the size is the last argument. */
EXPORT int cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize(void *h, int mode, int ops, void *x, void *z, void *y,
                                                                    void *scale, void *activation, size_t *size) {
    (void)h, (void)mode, (void)ops, (void)x, (void)z, (void)y, (void)scale, (void)activation;
    return *size = 0, 0;
}
EXPORT int cudnnGetBatchNormalizationBackwardExWorkspaceSize(void *h, int mode, int ops, void *x, void *y, void *dy,
                                                             void *dz, void *dx, void *scale, void *activation,
                                                             size_t *size) {
    (void)h, (void)mode, (void)ops, (void)x, (void)y, (void)dy, (void)dz, (void)dx, (void)scale, (void)activation;
    return *size = 0, 0;
}
EXPORT int cudnnGetBatchNormalizationTrainingExReserveSpaceSize(void *h, int mode, int ops, void *activation, void *x,
                                                                size_t *size) {
    return (void)h, (void)mode, (void)ops, (void)activation, (void)x, *size = 0, 0;
}

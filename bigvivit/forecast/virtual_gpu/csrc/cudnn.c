/* cuDNN: convolutions, batch normalisation and attention.
 *
 * Answers: the backend interface (descriptors that keep what they are given; one engine for every graph, a second one
 * without tensor cores and workspace where a convolution may take them), the older convolution calls, batch
 * normalisation, pooling, sampling by a grid.
 * Outputs, gradients and what autograd keeps are exact. Workspaces of convolutions on tensor cores are the estimate of
 * convolutions.c, others none; attention's is what an H100 asked for. Convolutions with a workspace, and those whose
 * windows do not lie side by side, which are no mere matrix products, are counted as estimates.
 * Recurrent networks are in recurrent.c, connectionist temporal classification in ctc.c.
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
int run_estimated(struct cudnn *handle, enum estimate kind) {
    count_estimate(kind);
    count_captured_node(handle->stream);
    return 0;
}
EXPORT int cudnnSetStream(struct cudnn *handle, void *stream) { return handle->stream = stream, 0; }
EXPORT int cudnnGetStream(struct cudnn *handle, void **stream) { return *stream = handle->stream, 0; }

/* Whether windows lie side by side, as the patches of a vision transformer: the stride is the kernel, nothing is padded
 * or dilated. */
static int lies_side_by_side(int64_t count, const int64_t *kernel, const int64_t *stride, const int64_t *dilation,
                             const int64_t *before, const int64_t *behind) {
    for (int64_t i = 0; i < count; i++)
        if (stride[i] != kernel[i] || before[i] || behind[i] || (dilation[i] != 1 && kernel[i] != 1)) return 0;
    return 1;
}

/* The backend interface */
enum { CONVOLUTION = 10, CONVOLUTION_BACKWARD_WEIGHT = 11, CONVOLUTION_BACKWARD_DATA = 12 }; /* types of descriptors */
enum { DILATIONS = 102, STRIDES = 103, PADDING_BEHIND = 104, PADDING_BEFORE = 105, TENSOR_SIZES = 902 };
enum { OPERATION_CONVOLUTION = 702 }; /* six further for the data's gradient, twelve for the weight's */
enum { ENGINE_HEURISTICS_RESULTS = 202, ENGINE_OF_CONFIGURATION = 300, CONFIGURATION_WORKSPACE = 303 };
enum { CONFIGURATION_SHARED_MEMORY = 304, PLAN_WORKSPACE = 402, ENGINE_INDEX = 1301, ENGINE_NOTES = 1303 };
enum { TYPE_INT64 = 3, TYPE_DESCRIPTOR = 15 };
enum { DATA_TYPE = 901, TENSOR_STRIDES = 903, ON_TENSOR_CORES = 0, FLOAT = 0 };
enum { ATTENTION_WORKSPACE = 256 }; /* of an H100, forward and backward, beside what PyTorch asks for by itself */

struct attribute {
    int name, type;
    int64_t count;
    struct attribute *next;
    char bytes[];
};
struct choice { /* of an engine, for the convolution that a descriptor is, contains or was chosen for */
    int convolves, estimated, tensor_cores, may_do_without, is_product; /* as it lies, without tensor cores */
    int64_t workspace;
};
struct descriptor {
    int type;
    struct choice choice;
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

static const struct attribute *find_attribute(const struct descriptor *in, int name) {
    const struct attribute *each = in->attributes;
    while (each && each->name != name) each = each->next;
    return each;
}
static const struct descriptor *descriptor_in(const struct descriptor *in, int name) {
    const struct attribute *found = find_attribute(in, name);
    return found && found->type == TYPE_DESCRIPTOR && found->count ? *(struct descriptor *const *)found->bytes : NULL;
}

static void read_numbers(const struct descriptor *in, int name, int64_t to[8]) {
    const struct attribute *found = in ? find_attribute(in, name) : NULL;
    for (int64_t i = 0; found && i < found->count && i < 8; i++) to[i] = ((const int64_t *)found->bytes)[i];
}
static struct layout read_layout(const struct descriptor *tensor) {
    struct layout layout = {0};
    const struct attribute *type = tensor ? find_attribute(tensor, DATA_TYPE) : NULL;
    const struct attribute *sizes = tensor ? find_attribute(tensor, TENSOR_SIZES) : NULL;
    if (type) memcpy(&layout.type, type->bytes, sizeof layout.type);
    if (sizes) layout.dimensions = (int)sizes->count;
    read_numbers(tensor, TENSOR_SIZES, layout.sizes);
    read_numbers(tensor, TENSOR_STRIDES, layout.strides);
    return layout;
}

/* What is known of an operation that is a convolution. Weights, image and output follow its own descriptor. */
static struct choice choose_engine(const struct descriptor *operation) {
    struct convolved convolved = {.kind = FORWARD};
    int at = OPERATION_CONVOLUTION;
    if (operation->type == CONVOLUTION_BACKWARD_DATA) convolved.kind = IMAGE_GRADIENT, at += 6;
    if (operation->type == CONVOLUTION_BACKWARD_WEIGHT) convolved.kind = WEIGHT_GRADIENT, at += 12;
    const struct descriptor *how = descriptor_in(operation, at);
    convolved.weight = read_layout(descriptor_in(operation, at + 1));
    convolved.image = read_layout(descriptor_in(operation, at + 2));
    convolved.output = read_layout(descriptor_in(operation, at + 3));
    int64_t dilation[8] = {0}, before[8] = {0}, behind[8] = {0};
    read_numbers(how, STRIDES, convolved.stride);
    read_numbers(how, DILATIONS, dilation);
    read_numbers(how, PADDING_BEFORE, before);
    read_numbers(how, PADDING_BEHIND, behind);
    int complete = how && convolved.weight.dimensions > 2 && convolved.image.dimensions == convolved.weight.dimensions &&
                   convolved.output.dimensions == convolved.weight.dimensions;
    struct choice choice = {.convolves = 1, .estimated = 1};
    if (!complete) return choice;
    choice.is_product = lies_side_by_side(convolved.weight.dimensions - 2, convolved.weight.sizes + 2, convolved.stride,
                                          dilation, before, behind);
    choice.may_do_without = convolved.weight.type == FLOAT;
    choice.tensor_cores = card()->capability >= (choice.may_do_without ? 80 : 70); /* TF32 came with Ampere */
    if (choice.tensor_cores) choice.workspace = (int64_t)convolution_scratch(&convolved);
    choice.estimated = choice.workspace > 0 || !choice.is_product;
    return choice;
}
EXPORT int cudnnBackendFinalize(struct descriptor *descriptor) {
    int type = descriptor->type;
    if (type == CONVOLUTION || type == CONVOLUTION_BACKWARD_DATA || type == CONVOLUTION_BACKWARD_WEIGHT)
        descriptor->choice = choose_engine(descriptor);
    return 0;
}
EXPORT int cudnnBackendSetAttribute(struct descriptor *to, int name, int type, int64_t count, const void *from) {
    size_t bytes = (size_t)count * size_of_type(type);
    struct attribute *kept = malloc(sizeof *kept + bytes);
    if (!kept) return CUDNN_INTERNAL_ERROR;
    *kept = (struct attribute){name, type, count, to->attributes};
    if (bytes) memcpy(kept->bytes, from, bytes);
    to->attributes = kept; /* before an older one of the same name */
    for (int64_t i = 0; type == TYPE_DESCRIPTOR && i < count; i++) {
        const struct descriptor *part = ((struct descriptor *const *)from)[i];
        if (part && part->choice.convolves) to->choice = part->choice;
    }
    return 0;
}
EXPORT int cudnnBackendGetAttribute(struct descriptor *const from, int name, int type, int64_t wanted, int64_t *count,
                                    void *to) {
    int64_t answered = 0;
    if (name == ENGINE_HEURISTICS_RESULTS || name == ENGINE_OF_CONFIGURATION) {
        /* The caller's own descriptors are filled in, with nothing but this. PyTorch leaves out what it may not take, and
         * goes on with the next where there is no memory for a workspace. */
        answered = 1 + (from->choice.tensor_cores && name == ENGINE_HEURISTICS_RESULTS);
        if (to && answered > wanted) answered = wanted; /* some ask for the best alone */
        for (int64_t i = 0; to && i < answered; i++) {
            struct descriptor *engine = ((struct descriptor **)to)[i];
            if (!engine) continue;
            engine->choice = from->choice;
            if (i == 1)
                engine->choice.tensor_cores = 0, engine->choice.workspace = 0,
                engine->choice.estimated = !engine->choice.is_product;
        }
    } else if (name == PLAN_WORKSPACE || name == CONFIGURATION_WORKSPACE) {
        int64_t workspace = from->choice.convolves ? from->choice.workspace : ATTENTION_WORKSPACE;
        if (wanted > 0 && to) memcpy(to, &workspace, sizeof workspace);
        answered = 1;
    } else if (name == ENGINE_NOTES) {
        answered = from->choice.tensor_cores && from->choice.may_do_without;
        if (answered && wanted > 0 && to) *(int *)to = ON_TENSOR_CORES;
    } else if (name == CONFIGURATION_SHARED_MEMORY || name == ENGINE_INDEX) {
        if (wanted > 0 && to) memset(to, 0, size_of_type(type));
        answered = 1;
    } else {
        const struct attribute *found = find_attribute(from, name);
        if (found && found->type == type) {
            int64_t given = wanted < found->count ? wanted : found->count;
            if (to && given > 0) memcpy(to, found->bytes, (size_t)given * size_of_type(type));
            answered = found->count;
        }
    }
    if (count) *count = answered;
    return 0;
}
EXPORT int cudnnBackendExecute(struct cudnn *handle, struct descriptor *plan, struct descriptor *pack) {
    (void)pack;
    if (plan->choice.estimated) count_estimate(CONVOLUTIONS);
    count_captured_node(handle->stream);
    return 0;
}

/* Older descriptors. Of tensors', filters' and convolutions' the sizes are read again. */
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
EXPORT int cudnnCreateFilterDescriptor(struct shape **to) { return cudnnCreateTensorDescriptor(to); }
EXPORT int cudnnDestroyFilterDescriptor(struct shape *shape) { return free(shape), 0; }
EXPORT int cudnnSetFilterNdDescriptor(struct shape *shape, int type, int format, int count, const int *sizes) {
    return (void)format, cudnnSetTensorNdDescriptor(shape, type, count, sizes, sizes);
}
struct convolution {
    int64_t padding[8], stride[8], dilation[8];
    int math_type;
};
EXPORT int cudnnCreateConvolutionDescriptor(struct convolution **to) {
    return (*to = calloc(1, sizeof **to)) ? 0 : CUDNN_INTERNAL_ERROR;
}
EXPORT int cudnnDestroyConvolutionDescriptor(struct convolution *convolution) { return free(convolution), 0; }
EXPORT int cudnnSetConvolutionNdDescriptor(struct convolution *to, int count, const int *padding, const int *stride,
                                           const int *dilation, int mode, int type) {
    (void)mode, (void)type;
    if (count < 0 || count > 8) return CUDNN_BAD_PARAM;
    for (int i = 0; i < count; i++) to->padding[i] = padding[i], to->stride[i] = stride[i], to->dilation[i] = dilation[i];
    return 0;
}
#define DESCRIPTOR(name)                                                                           \
    EXPORT int cudnnCreate##name##Descriptor(void **to) {                                          \
        return (*to = calloc(1, 1)) ? 0 : CUDNN_INTERNAL_ERROR;                                    \
    }                                                                                              \
    EXPORT int cudnnDestroy##name##Descriptor(void *descriptor) { return free(descriptor), 0; }
DESCRIPTOR(Activation)
DESCRIPTOR(Pooling)
DESCRIPTOR(SpatialTransformer)
#define DONE(name) \
    EXPORT int name(void) { return 0; }
DONE(cudnnSetConvolutionGroupCount)
EXPORT int cudnnSetConvolutionMathType(struct convolution *to, int type) { return to->math_type = type, 0; }
DONE(cudnnSetActivationDescriptor)
DONE(cudnnSetPooling2dDescriptor)
DONE(cudnnSetSpatialTransformerNdDescriptor)

#define WORK(name)                           \
    EXPORT int name(struct cudnn *handle) { \
        count_captured_node(handle->stream); \
        return 0;                            \
    }
WORK(cudnnBatchNormalizationForwardTrainingEx)
WORK(cudnnBatchNormalizationForwardInference)
WORK(cudnnBatchNormalizationBackwardEx)
WORK(cudnnPoolingForward)
WORK(cudnnSpatialTfGridGeneratorForward)
WORK(cudnnSpatialTfGridGeneratorBackward)
WORK(cudnnSpatialTfSamplerForward)
WORK(cudnnSpatialTfSamplerBackward)

static int convolve(struct cudnn *handle, const struct shape *weight, const struct convolution *how) {
    int64_t kernel[8];
    for (int i = 2; i < weight->count; i++) kernel[i - 2] = weight->sizes[i];
    if (!lies_side_by_side(weight->count - 2, kernel, how->stride, how->dilation, how->padding, how->padding))
        count_estimate(CONVOLUTIONS);
    count_captured_node(handle->stream);
    return 0;
}
EXPORT int cudnnConvolutionForward(struct cudnn *handle, const void *alpha, void *dx, const void *x, struct shape *weight,
                                   const void *w, struct convolution *how) {
    return (void)alpha, (void)dx, (void)x, (void)w, convolve(handle, weight, how);
}
EXPORT int cudnnConvolutionBiasActivationForward(struct cudnn *handle, const void *alpha, void *dx, const void *x,
                                                 struct shape *weight, const void *w, struct convolution *how) {
    return (void)alpha, (void)dx, (void)x, (void)w, convolve(handle, weight, how);
}
EXPORT int cudnnConvolutionBackwardData(struct cudnn *handle, const void *alpha, struct shape *weight, const void *w,
                                        void *dy, const void *y, struct convolution *how) {
    return (void)alpha, (void)w, (void)dy, (void)y, convolve(handle, weight, how);
}
EXPORT int cudnnConvolutionBackwardFilter(struct cudnn *handle, const void *alpha, void *dx, const void *x, void *dy,
                                          const void *y, struct convolution *how, int algorithm, void *space,
                                          size_t size, const void *beta, struct shape *weight) {
    (void)alpha, (void)dx, (void)x, (void)dy, (void)y, (void)algorithm, (void)space, (void)size, (void)beta;
    return convolve(handle, weight, how);
}

/* The older way to choose an algorithm: there is one, without a workspace. */
struct performance { /* cudnnConvolution*AlgoPerf_t */
    int algorithm, status;
    float time;
    size_t memory;
    int determinism, math_type, reserved[3];
};
static int choose(const struct convolution *how, int wanted, int *returned, struct performance *found) {
    if (wanted < 1) return CUDNN_BAD_PARAM;
    *returned = 1;
    *found = (struct performance){.algorithm = 1, .determinism = 1, .math_type = how->math_type};
    return 0;
}
#define CHOICE(kind)                                                                                                \
    EXPORT int cudnnGetConvolution##kind##Algorithm_v7(void *h, void *x, void *w, void *c, void *y, int wanted,     \
                                                       int *returned, struct performance *found) {                  \
        return (void)h, (void)x, (void)w, (void)y, choose(c, wanted, returned, found);                                 \
    }                                                                                                               \
    EXPORT int cudnnFindConvolution##kind##AlgorithmEx(void *h, void *dx, void *x, void *dw, void *w, void *c,      \
                                                       void *dy, void *y, int wanted, int *returned,                \
                                                       struct performance *found, void *space, size_t size) {       \
        (void)h, (void)dx, (void)x, (void)dw, (void)w, (void)dy, (void)y, (void)space, (void)size;                  \
        return choose(c, wanted, returned, found);                                                                  \
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

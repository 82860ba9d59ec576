/* cuDNN's recurrent networks and the dropout between their layers.
 *
 * Answers: descriptors, where each weight lies in the one buffer of all, sizes of the spaces, passes that do nothing.
 * The weights' buffer is as large as cuDNN's: MXNet computed it the same way and compared. PyTorch wants the matrices of
 * a layer in one piece, then its biases; the order of layers is ours.
 * What cuDNN asks as workspace and reserve space is not documented. The reserve space follows from what a backward pass
 * must know; with 256 bytes more it is to the byte what 18 networks of an H100 were asked for (torch 2.11, CUDA 13.0),
 * and without those what two on a P100 were (pytorch/pytorch#2895). The workspace is fitted to the same 18 networks, which
 * have one set of sizes, and is 1 % off a nineteenth. Every pass is counted as an estimate.
 */
#include "virtual_gpu.h"
#include <stdlib.h>

enum cell { RELU, TANH, LSTM, GRU };
enum { NO_BIAS = 0, TWO_BIASES = 2 };
enum { TRAINING = 1 };

struct dropout {
    float probability;
};
EXPORT int cudnnCreateDropoutDescriptor(struct dropout **to) {
    return (*to = calloc(1, sizeof **to)) ? 0 : CUDNN_INTERNAL_ERROR;
}
EXPORT int cudnnDestroyDropoutDescriptor(struct dropout *dropout) { return free(dropout), 0; }
EXPORT int cudnnSetDropoutDescriptor(struct dropout *dropout, void *handle, float probability, void *states, size_t size,
                                     unsigned long long seed) {
    (void)handle, (void)states, (void)size, (void)seed;
    return dropout->probability = probability, 0;
}
EXPORT int cudnnRestoreDropoutDescriptor(struct dropout *dropout, void *handle, float probability, void *states,
                                         size_t size, unsigned long long seed) {
    return cudnnSetDropoutDescriptor(dropout, handle, probability, states, size, seed);
}
/* A generator of 48 bytes for each of 1,024 threads of a multiprocessor: an estimate too. */
EXPORT int cudnnDropoutGetStatesSize(void *handle, size_t *size) {
    return (void)handle, *size = (size_t)card()->multiprocessors * 1024 * 48, 0;
}

struct network {
    enum cell cell;
    int bias_mode, type;
    size_t directions, input, hidden, output, layers; /* output: of a cell, smaller than hidden with a projection */
    float dropout;
};
EXPORT int cudnnCreateRNNDescriptor(struct network **to) {
    return (*to = calloc(1, sizeof **to)) ? 0 : CUDNN_INTERNAL_ERROR;
}
EXPORT int cudnnDestroyRNNDescriptor(struct network *network) { return free(network), 0; }
EXPORT int cudnnSetRNNDescriptor_v8(struct network *network, int algorithm, int cell, int bias_mode, int direction,
                                    int input_mode, int type, int precision, int math, int32_t input, int32_t hidden,
                                    int32_t projection, int32_t layers, struct dropout *dropout, uint32_t flags) {
    (void)algorithm, (void)input_mode, (void)precision, (void)math, (void)flags;
    *network = (struct network){
        .cell = cell, .bias_mode = bias_mode, .type = type, .directions = direction ? 2 : 1,
        .input = (size_t)input, .hidden = (size_t)hidden, .layers = (size_t)layers,
        .output = (size_t)(projection > 0 ? projection : hidden), .dropout = dropout ? dropout->probability : 0,
    };
    return 0;
}

/* The data: only its extent matters. */
struct sequences {
    size_t steps, batch;
};
EXPORT int cudnnCreateRNNDataDescriptor(struct sequences **to) {
    return (*to = calloc(1, sizeof **to)) ? 0 : CUDNN_INTERNAL_ERROR;
}
EXPORT int cudnnDestroyRNNDataDescriptor(struct sequences *data) { return free(data), 0; }
EXPORT int cudnnSetRNNDataDescriptor(struct sequences *data, int type, int layout, int steps, int batch, int width,
                                     const int *lengths, void *fill) {
    (void)type, (void)layout, (void)width, (void)lengths, (void)fill;
    return *data = (struct sequences){(size_t)steps, (size_t)batch}, 0;
}

/* Weights, counted in elements. A pseudo-layer is one direction of a layer. */
static size_t gates(const struct network *n) { return n->cell == LSTM ? 4 : n->cell == GRU ? 3 : 1; }
static size_t projection(const struct network *n) { return n->output < n->hidden ? n->output * n->hidden : 0; }
static size_t inputs(const struct network *n, size_t pseudo) {
    return pseudo < n->directions ? n->input : n->directions * n->output;
}
static size_t matrices(const struct network *n, size_t pseudo) {
    return gates(n) * n->hidden * (inputs(n, pseudo) + n->output) + projection(n);
}
static size_t matrices_before(const struct network *n, size_t pseudo) {
    size_t sum = 0;
    for (size_t i = 0; i < pseudo; i++) sum += matrices(n, i);
    return sum;
}
static size_t all_matrices(const struct network *n) { return matrices_before(n, n->layers * n->directions); }
static size_t biases(const struct network *n) { /* of a pseudo-layer */
    return gates(n) * n->hidden * (n->bias_mode == NO_BIAS ? 0 : n->bias_mode == TWO_BIASES ? 2 : 1);
}
static size_t element(const struct network *n) { return n->type == 1 ? 8 : n->type == 0 ? 4 : 2; } /* double, float */

EXPORT int cudnnGetRNNWeightSpaceSize(void *handle, struct network *n, size_t *size) {
    (void)handle;
    return *size = element(n) * (all_matrices(n) + n->layers * n->directions * biases(n)), 0;
}

static void describe(const struct network *n, struct shape *to, size_t rows, size_t columns) {
    *to = (struct shape){n->type, 3, {1, (int)rows, (int)columns}, {(int)(rows * columns), (int)columns, 1}};
}

/* The matrix and the bias of one gate: from the input for gates below `gates`, then from the state, then the projection.
 */
EXPORT int cudnnGetRNNWeightParams(void *handle, struct network *n, int32_t pseudo, size_t size, char *weights,
                                   int32_t gate, struct shape *matrix, void **matrix_at, struct shape *bias,
                                   void **bias_at) {
    (void)handle, (void)size;
    size_t layer = (size_t)pseudo, which = (size_t)gate, all = gates(n), in = inputs(n, layer);
    size_t recurrent = which >= all, projects = which == 2 * all;
    if (layer >= n->layers * n->directions || which > 2 * all) return CUDNN_BAD_PARAM;
    if (matrix_at) {
        size_t at = matrices_before(n, layer) + n->hidden * (recurrent ? all * in + (which - all) * n->output : which * in);
        int there = !projects || projection(n);
        *matrix_at = there ? weights + element(n) * at : NULL;
        if (projects && there) describe(n, matrix, n->output, n->hidden);
        else describe(n, matrix, there ? n->hidden : 0, recurrent ? n->output : in);
    }
    if (bias_at) {
        int first_only = n->bias_mode == 1, second_only = n->bias_mode == 3;
        int there = !projects && biases(n) && !(recurrent ? first_only : second_only);
        size_t at = all_matrices(n) + layer * biases(n) + n->hidden * (second_only ? which - all : which);
        *bias_at = there ? weights + element(n) * at : NULL;
        describe(n, bias, there ? n->hidden : 0, 1);
    }
    return 0;
}

/* Kept for the backward pass of each step: the gates; an LSTM's cells, and its states where they are projected; three
 * more of a GRU, since its candidate needs both products by themselves; what each layer gives to the next, with a mask
 * of bits where it is dropped. */
enum { NOTE = 256, WORKSPACE_NOTE = 384, OF_EACH_DIRECTION = 16 << 20 };
static size_t reserve(const struct network *n, size_t tokens) {
    size_t kept = gates(n) + (n->cell == LSTM ? 1 + (projection(n) > 0) : n->cell == GRU ? 3 : 0);
    size_t between = (n->layers - 1) * n->directions * n->output * tokens;
    return element(n) * (n->layers * n->directions * n->hidden * kept * tokens + between) +
           (n->dropout > 0 ? (between + 7) / 8 : 0) + NOTE;
}
/* Every matrix once more, the gates and the output of one layer, states of a step; the output once more where some of it
 * is dropped; and a part of fixed size. The simplest cell takes another way, for which more is needed. */
static size_t workspace(const struct network *n, size_t batch, size_t steps) {
    size_t simple = n->cell == RELU || n->cell == TANH, outputs = steps * batch * n->hidden, states = batch * n->hidden;
    size_t layers = simple ? outputs * (8 + 7 * n->directions) + 12 * states
                           : n->directions * ((gates(n) + 1) * outputs + (10 * gates(n) + 5) * states);
    size_t dropped = n->dropout > 0 && !simple ? n->directions * outputs : 0;
    return element(n) * (all_matrices(n) + layers + dropped) + n->directions * OF_EACH_DIRECTION + WORKSPACE_NOTE;
}
EXPORT int cudnnGetRNNTempSpaceSizes(void *handle, struct network *n, int mode, struct sequences *data, size_t *work,
                                     size_t *kept) {
    (void)handle;
    if (work) *work = workspace(n, data->batch, data->steps);
    if (kept) *kept = mode == TRAINING ? reserve(n, data->batch * data->steps) : 0;
    return 0;
}

EXPORT int cudnnRNNForward(struct cudnn *handle) { return run_estimated(handle, RECURRENT_PASSES); }
EXPORT int cudnnRNNBackwardData_v8(struct cudnn *handle) { return run_estimated(handle, RECURRENT_PASSES); }
EXPORT int cudnnRNNBackwardWeights_v8(struct cudnn *handle) { return run_estimated(handle, RECURRENT_PASSES); }

/* What cuDNN takes as workspace of a convolution on tensor cores: an estimate, from what an H100 was asked for.
 *
 * The source: the requests of public programs on an H100 (torch 2.11, CUDA 13.0), 769 different convolutions, each beside
 * the same call here: bench/results/library_scratch_nvidia-h100-80gb-hbm3_2026-11-26.json, to which
 * tests/forecast/virtual_gpu/test_measured.py holds this file. What they show:
 *  - Tensor cores want the channels last. A tensor that has them first is copied: image, weights and output, each with its
 *    channels padded to 16 bytes. With a window of one pixel and no stride a convolution is a matrix product as it lies.
 *  - The gradient of the weights is summed up in parts, in fp32, about as many as keep the multiprocessors busy.
 *  - With few channels the copies go the other way. Each channel by itself needs nothing.
 * Which of its engines cuDNN takes is its own secret: this is within 1 KiB what four of five calls asked for, not all.
 */
#include "virtual_gpu.h"

enum { FLOAT = 0, DOUBLE = 1 }; /* cudnnDataType_t */
enum { NOTE = 16, TILE = 1 << 16, MEBIBYTE = 1 << 20 };

static size_t element(int type) { return type == DOUBLE ? 8 : type == FLOAT ? 4 : 2; }

static size_t count(const struct layout *t) {
    size_t product = 1;
    for (int i = 0; i < t->dimensions; i++) product *= (size_t)t->sizes[i];
    return product;
}
static size_t bytes(const struct layout *t) { return count(t) * element(t->type); }

static size_t pixels(const struct layout *t) { /* of a window, or an image */
    size_t product = 1;
    for (int i = 2; i < t->dimensions; i++) product *= (size_t)t->sizes[i];
    return product;
}

/* Whether the channels of a pixel lie next to each other. */
static int has_channels_last(const struct layout *t) {
    int64_t expected = 1;
    for (int i = 0; i < t->dimensions; i++) {
        int at = i == 0 ? 1 : i == t->dimensions - 1 ? 0 : t->dimensions - i;
        if (t->sizes[at] != 1 && t->strides[at] != expected) return 0;
        expected *= t->sizes[at];
    }
    return 1;
}

/* Bytes of a copy with the channels last, padded: of weights those of both sides. */
static size_t copy(const struct layout *t, int is_weight) {
    if (has_channels_last(t)) return 0;
    size_t multiple = 16 / element(t->type), padded = count(t);
    for (int i = is_weight ? 0 : 1; i < 2; i++) {
        size_t size = (size_t)t->sizes[i];
        padded = padded / size * ((size + multiple - 1) / multiple * multiple);
    }
    return padded * element(t->type);
}
static size_t copies(const struct convolved *c) { return copy(&c->image, 0) + copy(&c->weight, 1) + copy(&c->output, 0); }

static size_t least(size_t a, size_t b) { return a < b ? a : b; }
static size_t most(size_t a, size_t b) { return a > b ? a : b; }

/* Of the weights' gradient, where it is a matrix product as it lies. */
static size_t parts_of_product(const struct convolved *c, int channels_first) {
    size_t multiprocessors = (size_t)card()->multiprocessors, wave = multiprocessors * TILE, sum = count(&c->weight) * 4;
    if (!channels_first) {
        if (sum >= 4 * MEBIBYTE) return 0;
        return least(sum < 4096 ? 2 * multiprocessors * sum : most(sum * multiprocessors / 2, wave / 2), 2 * wave);
    }
    if (c->weight.type == FLOAT) return 2 * sum;
    return least(8 * sum, copy(&c->image, 0) + copy(&c->output, 0));
}

/* Of the weights' gradient otherwise. */
static size_t parts(const struct convolved *c, int channels_first) {
    size_t wave = (size_t)card()->multiprocessors * TILE, sum = count(&c->weight) * 4;
    if (channels_first && c->weight.type != FLOAT) return 0;
    if (sum <= 9 * TILE / 4) return 14 * 9 * TILE / 4;
    if (sum > 4 * MEBIBYTE) return channels_first ? 6 * MEBIBYTE : 3 * MEBIBYTE / 2;
    return (channels_first || sum > 2 * MEBIBYTE ? wave : wave / 2) / sum * sum;
}

size_t convolution_scratch(const struct convolved *c) {
    size_t window = pixels(&c->weight);
    int64_t channels = c->image.sizes[1], outputs = c->weight.sizes[0];
    if (!count(&c->image) || !count(&c->weight) || !count(&c->output)) return 0; /* channels may be none */
    if (c->weight.type == DOUBLE || (c->weight.sizes[1] == 1 && channels > 1)) return 0;
    int strided = 0, channels_first = !has_channels_last(&c->image) || !has_channels_last(&c->output);
    for (int i = 0; i < c->weight.dimensions - 2; i++) strided |= c->stride[i] != 1;
    int is_product = window == 1 && !strided;
    if (channels_first && c->weight.type == FLOAT) {
        if (pixels(&c->output) == 1 && c->kind != FORWARD) return 0; /* the window is the whole image */
        if (channels <= 4 && window <= 16) return 0;
    }
    if (channels_first && c->kind == IMAGE_GRADIENT && outputs < 8) return 0;
    if (c->kind == WEIGHT_GRADIENT) {
        if (is_product) return parts_of_product(c, channels_first) + NOTE;
        if (!channels_first && window > 1 && (channels <= 16 || outputs <= 16))
            return bytes(&c->image) + bytes(&c->weight) + bytes(&c->output) + NOTE;
        return copies(c) + parts(c, channels_first) + NOTE;
    }
    if (channels_first) return is_product ? 0 : copies(c) + NOTE;
    if (window > 1 && channels < 16) return bytes(c->kind == FORWARD ? &c->image : &c->output) + bytes(&c->weight) + NOTE;
    return 0;
}

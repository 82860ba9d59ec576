/* cuBLAS and cuBLASLt: products take the workspaces that PyTorch gives them, and do nothing.
 *
 * Answers: handles, streams, math and pointer modes, every product, batched product, triangular solve, dot product and
 * batch of factorisations that PyTorch calls; of cuBLASLt descriptors and layouts, and one algorithm for every product that wants no more
 * workspace than is offered (PyTorch allocates its workspaces before it asks).
 * Does not answer: BLAS calls that only MAGMA makes.
 */
#include "virtual_gpu.h"
#include <stdlib.h>
#include <string.h>

struct blas {
    void *stream;
    int math_mode, pointer_mode, multiprocessors;
};
EXPORT int cublasCreate_v2(struct blas **handle) {
    touch(current_device());
    return (*handle = calloc(1, sizeof **handle)) ? 0 : 3;
}
EXPORT int cublasDestroy_v2(struct blas *handle) { return free(handle), 0; }
EXPORT int cublasSetStream_v2(struct blas *handle, void *stream) { return handle->stream = stream, 0; }
EXPORT int cublasGetStream_v2(struct blas *handle, void **stream) { return *stream = handle->stream, 0; }
EXPORT int cublasSetMathMode(struct blas *handle, int mode) { return handle->math_mode = mode, 0; }
EXPORT int cublasGetMathMode(struct blas *handle, int *mode) { return *mode = handle->math_mode, 0; }
EXPORT int cublasSetPointerMode_v2(struct blas *handle, int mode) { return handle->pointer_mode = mode, 0; }
EXPORT int cublasGetPointerMode_v2(struct blas *handle, int *mode) { return *mode = handle->pointer_mode, 0; }
EXPORT int cublasSetSmCountTarget(struct blas *handle, int count) { return handle->multiprocessors = count, 0; }
EXPORT int cublasGetSmCountTarget(struct blas *handle, int *count) { return *count = handle->multiprocessors, 0; }

#define PRODUCT(name)                        \
    EXPORT int name(struct blas *handle) {   \
        count_captured_node(handle->stream); \
        return 0;                            \
    }
#define IN_ALL_TYPES(prefix, suffix) \
    PRODUCT(prefix##S##suffix) PRODUCT(prefix##D##suffix) PRODUCT(prefix##C##suffix) PRODUCT(prefix##Z##suffix)

PRODUCT(cublasSetWorkspace_v2)
IN_ALL_TYPES(cublas, gemm_v2)
IN_ALL_TYPES(cublas, gemmBatched)
IN_ALL_TYPES(cublas, gemmStridedBatched)
IN_ALL_TYPES(cublas, gemv_v2)
IN_ALL_TYPES(cublas, trsm_v2)
IN_ALL_TYPES(cublas, trsmBatched)
IN_ALL_TYPES(cublas, getrfBatched)
PRODUCT(cublasGemmEx)
PRODUCT(cublasSgemmEx)
PRODUCT(cublasGemmBatchedEx)
PRODUCT(cublasGemmStridedBatchedEx)
PRODUCT(cublasSdot_v2)
PRODUCT(cublasDdot_v2)
PRODUCT(cublasCdotu_v2)
PRODUCT(cublasCdotc_v2)
PRODUCT(cublasZdotu_v2)
PRODUCT(cublasZdotc_v2)
PRODUCT(cublasDotEx)

/* Batches of factorisations and solutions: the status comes back to the host. */
#define SOLUTIONS(T) \
    EXPORT int cublas##T##getrsBatched(struct blas *handle, int trans, int n, int columns, void *a, int la, void *pivots, \
                                       void *b, int lb, int *status, int batch) { \
        (void)trans, (void)n, (void)columns, (void)a, (void)la, (void)pivots, (void)b, (void)lb, (void)batch; \
        count_captured_node(handle->stream); \
        return *status = 0; \
    } \
    EXPORT int cublas##T##geqrfBatched(struct blas *handle, int m, int n, void *a, int la, void *tau, int *status, \
                                       int batch) { \
        (void)m, (void)n, (void)a, (void)la, (void)tau, (void)batch; \
        count_captured_node(handle->stream); \
        return *status = 0; \
    } \
    EXPORT int cublas##T##gelsBatched(struct blas *handle, int trans, int m, int n, int columns, void *a, int la, void *c, \
                                      int lc, int *status, void *statuses, int batch) { \
        (void)trans, (void)m, (void)n, (void)columns, (void)a, (void)la, (void)c, (void)lc, (void)statuses, (void)batch; \
        count_captured_node(handle->stream); \
        return *status = 0; \
    }
SOLUTIONS(S)
SOLUTIONS(D)
SOLUTIONS(C)
SOLUTIONS(Z)

/* cuBLASLt. A handle of cuBLAS serves as one of cuBLASLt; the stream comes with each product. */
EXPORT int cublasLtCreate(struct blas **handle) { return cublasCreate_v2(handle); }
EXPORT int cublasLtDestroy(struct blas *handle) { return cublasDestroy_v2(handle); }

#define OBJECT(name)                                                                  \
    EXPORT int name##Create(void **to) { return (*to = calloc(1, 256)) ? 0 : 3; }     \
    EXPORT int name##Destroy(void *object) { return free(object), 0; }                \
    EXPORT int name##SetAttribute(void *object, int attribute, const void *from, size_t size) { \
        return (void)object, (void)attribute, (void)from, (void)size, 0;              \
    }
OBJECT(cublasLtMatmulDesc)
OBJECT(cublasLtMatrixLayout)
OBJECT(cublasLtMatrixTransformDesc)

struct preference {
    size_t workspace;
};
EXPORT int cublasLtMatmulPreferenceCreate(struct preference **to) { return (*to = calloc(1, sizeof **to)) ? 0 : 3; }
EXPORT int cublasLtMatmulPreferenceDestroy(struct preference *object) { return free(object), 0; }
EXPORT int cublasLtMatmulPreferenceSetAttribute(struct preference *object, int attribute, const void *from, size_t size) {
    if (attribute == 1 && size == sizeof object->workspace) memcpy(&object->workspace, from, size); /* MAX_WORKSPACE */
    return 0;
}

struct heuristic { /* cublasLtMatmulHeuristicResult_t */
    uint64_t algorithm[8];
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
};
EXPORT int cublasLtMatmulAlgoGetHeuristic(void *handle, void *product, void *a, void *b, void *c, void *d,
                                          struct preference *preference, int wanted, struct heuristic *found, int *count) {
    (void)handle, (void)product, (void)a, (void)b, (void)c, (void)d, (void)preference;
    *count = wanted > 0;
    if (wanted > 0) memset(found, 0, sizeof *found), found->waves = 1;
    return 0;
}
EXPORT int cublasLtMatmulAlgoInit(void *handle, int ct, int st, int at, int bt, int c, int d, int id, uint64_t *algorithm) {
    (void)handle, (void)ct, (void)st, (void)at, (void)bt, (void)c, (void)d;
    memset(algorithm, 0, 8 * sizeof *algorithm);
    algorithm[0] = (uint64_t)id;
    return 0;
}
EXPORT int cublasLtMatmulAlgoCheck(void *handle, void *product, void *a, void *b, void *c, void *d, const void *algorithm,
                                   struct heuristic *found) {
    (void)handle, (void)product, (void)a, (void)b, (void)c, (void)d;
    memset(found, 0, sizeof *found);
    memcpy(found->algorithm, algorithm, sizeof found->algorithm);
    return 0;
}
EXPORT int cublasLtMatmulAlgoConfigSetAttribute(void *algorithm, int attribute, const void *from, size_t size) {
    return (void)algorithm, (void)attribute, (void)from, (void)size, 0;
}
EXPORT int cublasLtMatmulAlgoConfigGetAttribute(const void *algorithm, int attribute, void *to, size_t size, size_t *n) {
    (void)algorithm, (void)attribute;
    memset(to, 0, size);
    if (n) *n = size;
    return 0;
}
EXPORT int cublasLtMatmul(void *handle, void *product, const void *alpha, const void *a, void *la, const void *b, void *lb,
                          const void *beta, const void *c, void *lc, void *d, void *ld, const void *algorithm, void *w,
                          size_t size, void *stream) {
    (void)handle, (void)product, (void)alpha, (void)a, (void)la, (void)b, (void)lb, (void)beta, (void)c, (void)lc;
    (void)d, (void)ld, (void)algorithm, (void)w, (void)size;
    count_captured_node(stream);
    return 0;
}
PRODUCT(cublasLtMatrixTransform)

/* cuSPARSE: matrices that know their extent, products and solutions that do nothing.
 *
 * Answers: what products, sums and triangular solutions of sparse matrices call in PyTorch.
 * Scratch is an estimate, counted at every question for it: an index for each row of a product, twice what is sorted,
 * both operands of a solution. How many elements a product of two sparse matrices has depends on their values: as many as
 * if the second's rows were equally filled and no two products met. A sum has those of both.
 */
#include "virtual_gpu.h"
#include <stdlib.h>

enum { SPARSE_NOT_ALLOCATED = 2 };
enum { INDEX = 4 }; /* bytes */

struct sparse {
    void *stream;
};
EXPORT int cusparseCreate(struct sparse **to) {
    touch(current_device());
    return (*to = calloc(1, sizeof **to)) ? 0 : SPARSE_NOT_ALLOCATED;
}
EXPORT int cusparseDestroy(struct sparse *handle) { return free(handle), 0; }
EXPORT int cusparseSetStream(struct sparse *handle, void *stream) { return handle->stream = stream, 0; }
EXPORT int cusparseSetPointerMode(struct sparse *handle, int mode) { return (void)handle, (void)mode, 0; }

static int told(size_t *to, size_t bytes) {
    count_estimate(SPARSE_PRODUCTS);
    return *to = bytes, 0;
}

/* Matrices */
struct matrix {
    int64_t rows, columns, elements;
};
static int make(struct matrix **to, int64_t rows, int64_t columns, int64_t elements) {
    if (!(*to = malloc(sizeof **to))) return SPARSE_NOT_ALLOCATED;
    **to = (struct matrix){rows, columns, elements};
    return 0;
}
EXPORT int cusparseCreateCoo(struct matrix **to, int64_t rows, int64_t columns, int64_t elements) {
    return make(to, rows, columns, elements);
}
EXPORT int cusparseCreateCsr(struct matrix **to, int64_t rows, int64_t columns, int64_t elements) {
    return make(to, rows, columns, elements);
}
EXPORT int cusparseCreateDnMat(struct matrix **to, int64_t rows, int64_t columns) {
    return make(to, rows, columns, rows * columns);
}
EXPORT int cusparseCreateDnVec(struct matrix **to, int64_t size) { return make(to, size, 1, size); }
EXPORT int cusparseDestroySpMat(struct matrix *matrix) { return free(matrix), 0; }
EXPORT int cusparseDestroyDnMat(struct matrix *matrix) { return free(matrix), 0; }
EXPORT int cusparseDestroyDnVec(struct matrix *vector) { return free(vector), 0; }
EXPORT int cusparseSpMatGetSize(struct matrix *matrix, int64_t *rows, int64_t *columns, int64_t *elements) {
    return *rows = matrix->rows, *columns = matrix->columns, *elements = matrix->elements, 0;
}
#define DONE(name) \
    EXPORT int name(void) { return 0; }
DONE(cusparseCsrSetPointers)
DONE(cusparseCsrSetStridedBatch)
DONE(cusparseDnMatSetStridedBatch)
DONE(cusparseSpMatSetAttribute)
DONE(cusparseSetMatType)
DONE(cusparseSetMatDiagType)
DONE(cusparseSetMatFillMode)
DONE(cusparseSetMatIndexBase)
#define OBJECT(create, destroy) \
    EXPORT int create(void **to) { return (*to = calloc(1, 1)) ? 0 : SPARSE_NOT_ALLOCATED; } \
    EXPORT int destroy(void *object) { return free(object), 0; }
OBJECT(cusparseCreateMatDescr, cusparseDestroyMatDescr)
OBJECT(cusparseCreateBsrsm2Info, cusparseDestroyBsrsm2Info)
OBJECT(cusparseCreateBsrsv2Info, cusparseDestroyBsrsv2Info)
OBJECT(cusparseSpGEMM_createDescr, cusparseSpGEMM_destroyDescr)
OBJECT(cusparseSpSM_createDescr, cusparseSpSM_destroyDescr)
OBJECT(cusparseSpSV_createDescr, cusparseSpSV_destroyDescr)

#define WORK(name) \
    EXPORT int name(struct sparse *handle) { \
        count_captured_node(handle->stream); \
        return 0; \
    }
WORK(cusparseSpMM)
WORK(cusparseSpMV)
WORK(cusparseSDDMM)
WORK(cusparseSDDMM_preprocess)
WORK(cusparseSpSM_analysis)
WORK(cusparseSpSM_solve)
WORK(cusparseSpSV_analysis)
WORK(cusparseSpSV_solve)
WORK(cusparseSpGEMM_copy)
WORK(cusparseXcoo2csr)
WORK(cusparseXcoosortByRow)
WORK(cusparseXcsrsort)
WORK(cusparseCreateIdentityPermutation)

/* Scratch */
EXPORT int cusparseSpMM_bufferSize(void *h, int oa, int ob, void *alpha, struct matrix *a, void *b, void *beta, void *c,
                                   int type, int algorithm, size_t *size) {
    (void)h, (void)oa, (void)ob, (void)alpha, (void)b, (void)beta, (void)c, (void)type, (void)algorithm;
    return told(size, INDEX * (size_t)(a->rows + 1));
}
EXPORT int cusparseSpMV_bufferSize(void *h, int oa, void *alpha, struct matrix *a, void *x, void *beta, void *y, int type,
                                   int algorithm, size_t *size) {
    (void)h, (void)oa, (void)alpha, (void)x, (void)beta, (void)y, (void)type, (void)algorithm;
    return told(size, INDEX * (size_t)(a->rows + 1));
}
EXPORT int cusparseSDDMM_bufferSize(void *h, int oa, int ob, void *alpha, void *a, void *b, void *beta, struct matrix *c,
                                    int type, int algorithm, size_t *size) {
    (void)h, (void)oa, (void)ob, (void)alpha, (void)a, (void)b, (void)beta, (void)type, (void)algorithm;
    return told(size, INDEX * (size_t)(c->rows + 1));
}
static size_t of_type(int type) { /* cudaDataType: double, complex of floats, complex of doubles, halves */
    return type == 5 ? 16 : type == 1 || type == 4 ? 8 : type == 2 || type == 14 ? 2 : 4;
}
EXPORT int cusparseSpSM_bufferSize(void *h, int oa, int ob, void *alpha, struct matrix *a, struct matrix *b,
                                   struct matrix *c, int type, int algorithm, void *with, size_t *size) {
    (void)h, (void)oa, (void)ob, (void)alpha, (void)a, (void)algorithm, (void)with;
    return told(size, of_type(type) * (size_t)(b->elements + c->elements));
}
EXPORT int cusparseSpSV_bufferSize(void *h, int oa, void *alpha, struct matrix *a, struct matrix *x, struct matrix *y,
                                   int type, int algorithm, void *with, size_t *size) {
    (void)h, (void)oa, (void)alpha, (void)a, (void)algorithm, (void)with;
    return told(size, of_type(type) * (size_t)(x->elements + y->elements));
}
EXPORT int cusparseXcoosort_bufferSizeExt(void *h, int m, int n, int elements, void *rows, void *columns, size_t *size) {
    return (void)h, (void)m, (void)n, (void)rows, (void)columns, told(size, 4 * INDEX * (size_t)elements);
}
EXPORT int cusparseXcsrsort_bufferSizeExt(void *h, int m, int n, int elements, void *rows, void *columns, size_t *size) {
    return (void)h, (void)m, (void)n, (void)rows, (void)columns, told(size, 4 * INDEX * (size_t)elements);
}

/* A product of two sparse matrices: asked twice for scratch, first without any to write to. */
static size_t products(const struct matrix *a, const struct matrix *b) {
    return (size_t)(b->rows ? (a->elements * b->elements + b->rows - 1) / b->rows : 0);
}
EXPORT int cusparseSpGEMM_workEstimation(struct sparse *handle, int oa, int ob, void *alpha, struct matrix *a,
                                         struct matrix *b, void *beta, struct matrix *c, int type, int algorithm,
                                         void *with, size_t *size, void *scratch) {
    (void)oa, (void)ob, (void)alpha, (void)b, (void)beta, (void)c, (void)type, (void)algorithm, (void)with;
    if (!scratch) return told(size, INDEX * (size_t)(a->elements + a->rows));
    count_captured_node(handle->stream);
    return 0;
}
EXPORT int cusparseSpGEMM_compute(struct sparse *handle, int oa, int ob, void *alpha, struct matrix *a, struct matrix *b,
                                  void *beta, struct matrix *c, int type, int algorithm, void *with, size_t *size,
                                  void *scratch) {
    (void)oa, (void)ob, (void)alpha, (void)beta, (void)algorithm, (void)with;
    if (!scratch) return told(size, (INDEX + of_type(type)) * products(a, b));
    int64_t most = c->rows * c->columns, found = (int64_t)products(a, b);
    c->elements = found < most ? found : most;
    count_captured_node(handle->stream);
    return 0;
}

/* A sum */
EXPORT int cusparseXcsrgeam2Nnz(struct sparse *handle, int m, int n, void *ta, int elements, void *ar, void *ac, void *tb,
                                int others, void *br, void *bc, void *tc, void *cr, int *found, void *scratch) {
    (void)ta, (void)ar, (void)ac, (void)tb, (void)br, (void)bc, (void)tc, (void)cr, (void)scratch;
    int64_t most = (int64_t)m * n, both = (int64_t)elements + others;
    *found = (int)(both < most ? both : most);
    count_captured_node(handle->stream);
    return 0;
}
#define IN_TYPE(T) \
    EXPORT int cusparse##T##csrgeam2_bufferSizeExt( \
        void *h, int m, int n, void *alpha, void *ta, int elements, void *a, void *ar, void *ac, void *beta, void *tb, \
        int others, void *b, void *br, void *bc, void *tc, void *c, void *cr, void *cc, size_t *size) { \
        (void)h, (void)n, (void)alpha, (void)ta, (void)elements, (void)a, (void)ar, (void)ac, (void)beta, (void)tb; \
        (void)others, (void)b, (void)br, (void)bc, (void)tc, (void)c, (void)cr, (void)cc; \
        return told(size, INDEX * (size_t)(m + 1)); \
    } \
    EXPORT int cusparse##T##bsrsm2_bufferSize(void *h, int order, int ta, int tx, int blocks, int n, int elements, \
                                              void *type, void *a, void *ar, void *ac, int block, void *with, int *size) { \
        (void)h, (void)order, (void)ta, (void)tx, (void)n, (void)elements, (void)type, (void)a, (void)ar, (void)ac; \
        (void)with, count_estimate(SPARSE_PRODUCTS); \
        return *size = INDEX * blocks * block, 0; \
    } \
    EXPORT int cusparse##T##bsrsv2_bufferSize(void *h, int order, int ta, int blocks, int elements, void *type, void *a, \
                                              void *ar, void *ac, int block, void *with, int *size) { \
        (void)h, (void)order, (void)ta, (void)elements, (void)type, (void)a, (void)ar, (void)ac; \
        (void)with, count_estimate(SPARSE_PRODUCTS); \
        return *size = INDEX * blocks * block, 0; \
    } \
    WORK(cusparse##T##csrgeam2) \
    WORK(cusparse##T##bsrmm) \
    WORK(cusparse##T##bsrmv) \
    WORK(cusparse##T##bsrsm2_analysis) \
    WORK(cusparse##T##bsrsm2_solve) \
    WORK(cusparse##T##bsrsv2_analysis) \
    WORK(cusparse##T##bsrsv2_solve)
IN_TYPE(S)
IN_TYPE(D)
IN_TYPE(C)
IN_TYPE(Z)
EXPORT int cusparseXbsrsm2_zeroPivot(void *h, void *with, int *position) { return (void)h, (void)with, *position = -1, 0; }
EXPORT int cusparseXbsrsv2_zeroPivot(void *h, void *with, int *position) { return (void)h, (void)with, *position = -1, 0; }

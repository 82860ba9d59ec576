/* cuSOLVER: factorisations and solutions that do nothing, and find nothing wrong.
 *
 * Answers: what torch.linalg calls of the dense interface. The status that each leaves on the device is whatever PyTorch
 * put there, and reads as zero: no matrix is singular.
 * Scratch is an estimate: what LAPACK asks for the same, with blocks of 64 columns. Every question for it is counted.
 */
#include "virtual_gpu.h"
#include <stdlib.h>

enum { BLOCK = 64, NOT_ALLOCATED = 2 };

struct solver {
    void *stream;
};
EXPORT int cusolverDnCreate(struct solver **to) {
    touch(current_device());
    return (*to = calloc(1, sizeof **to)) ? 0 : NOT_ALLOCATED;
}
EXPORT int cusolverDnDestroy(struct solver *handle) { return free(handle), 0; }
EXPORT int cusolverDnSetStream(struct solver *handle, void *stream) { return handle->stream = stream, 0; }
EXPORT int cusolverDnCreateParams(void **to) { return (*to = calloc(1, 1)) ? 0 : NOT_ALLOCATED; }
EXPORT int cusolverDnDestroyParams(void *parameters) { return free(parameters), 0; }
EXPORT int cusolverDnCreateGesvdjInfo(void **to) { return cusolverDnCreateParams(to); }
EXPORT int cusolverDnDestroyGesvdjInfo(void *parameters) { return free(parameters), 0; }
EXPORT int cusolverDnCreateSyevjInfo(void **to) { return cusolverDnCreateParams(to); }
EXPORT int cusolverDnDestroySyevjInfo(void *parameters) { return free(parameters), 0; }
EXPORT int cusolverDnXgesvdjSetTolerance(void *parameters, double to) { return (void)parameters, (void)to, 0; }
EXPORT int cusolverDnXgesvdjSetMaxSweeps(void *parameters, int to) { return (void)parameters, (void)to, 0; }
EXPORT int cusolverDnXgesvdjSetSortEig(void *parameters, int to) { return (void)parameters, (void)to, 0; }

/* Scratch in elements, of a matrix of m x n. */
static size_t smaller(size_t m, size_t n) { return m < n ? m : n; }
static size_t panel(size_t m, size_t n) { return BLOCK * (m > n ? m : n); }
static size_t of_eigenvalues(size_t n) { return 2 * n * n + 6 * n + 1; }
static size_t of_singular_values(size_t m, size_t n) { return BLOCK * (m + n) + 3 * smaller(m, n); }
static size_t of_jacobi(size_t m, size_t n) { return m * n + smaller(m, n) * smaller(m, n); }

static int tell(int *to, size_t elements) {
    count_estimate(DENSE_SOLVERS);
    return *to = elements < INT32_MAX ? (int)elements : INT32_MAX, 0;
}
static size_t of_type(int type) { /* cudaDataType: double, complex of floats, complex of doubles */
    return type == 5 ? 16 : type == 1 || type == 4 ? 8 : 4;
}
static int tell_bytes(size_t *device, size_t *host, int type, size_t elements) {
    count_estimate(DENSE_SOLVERS);
    return *device = of_type(type) * elements, *host = 0, 0;
}

#define SIZES(T, Q, Y) /* T: S, D, C, Z; Q: or, un; Y: sy, he */ \
    EXPORT int cusolverDn##T##geqrf_bufferSize(void *h, int m, int n, void *a, int la, int *size) { \
        return (void)h, (void)a, (void)la, tell(size, panel((size_t)m, (size_t)n)); \
    } \
    EXPORT int cusolverDn##T##getrf_bufferSize(void *h, int m, int n, void *a, int la, int *size) { \
        return (void)h, (void)a, (void)la, tell(size, panel((size_t)m, (size_t)n)); \
    } \
    EXPORT int cusolverDn##T##potrf_bufferSize(void *h, int part, int n, void *a, int la, int *size) { \
        return (void)h, (void)part, (void)a, (void)la, tell(size, panel((size_t)n, 0)); \
    } \
    EXPORT int cusolverDn##T##sytrf_bufferSize(void *h, int n, void *a, int la, int *size) { \
        return (void)h, (void)a, (void)la, tell(size, panel((size_t)n, 0)); \
    } \
    EXPORT int cusolverDn##T##Q##gqr_bufferSize(void *h, int m, int n, int k, void *a, int la, void *t, int *size) { \
        return (void)h, (void)k, (void)a, (void)la, (void)t, tell(size, panel((size_t)m, (size_t)n)); \
    } \
    EXPORT int cusolverDn##T##Q##mqr_bufferSize(void *h, int side, int trans, int m, int n, int k, void *a, int la, \
                                                void *t, void *c, int lc, int *size) { \
        (void)h, (void)side, (void)trans, (void)k, (void)a, (void)la, (void)t, (void)c, (void)lc; \
        return tell(size, panel((size_t)m, (size_t)n)); \
    } \
    EXPORT int cusolverDn##T##Y##evd_bufferSize(void *h, int job, int part, int n, void *a, int la, void *w, int *size) { \
        return (void)h, (void)job, (void)part, (void)a, (void)la, (void)w, tell(size, of_eigenvalues((size_t)n)); \
    } \
    EXPORT int cusolverDn##T##Y##evjBatched_bufferSize(void *h, int job, int part, int n, void *a, int la, void *w, \
                                                       int *size, void *p, int batch) { \
        (void)h, (void)job, (void)part, (void)a, (void)la, (void)w, (void)p; \
        return tell(size, (size_t)batch * of_jacobi((size_t)n, (size_t)n)); \
    } \
    EXPORT int cusolverDn##T##Y##evj_bufferSize(void *h, int job, int part, int n, void *a, int la, void *w, int *size, \
                                                void *p) { \
        (void)h, (void)job, (void)part, (void)a, (void)la, (void)w, (void)p; \
        return tell(size, of_jacobi((size_t)n, (size_t)n)); \
    } \
    EXPORT int cusolverDn##T##gesvd_bufferSize(void *h, int m, int n, int *size) { \
        return (void)h, tell(size, of_singular_values((size_t)m, (size_t)n)); \
    } \
    EXPORT int cusolverDn##T##gesvdj_bufferSize(void *h, int job, int economic, int m, int n, void *a, int la, void *s, \
                                                void *u, int lu, void *v, int lv, int *size, void *p) { \
        (void)h, (void)job, (void)economic, (void)a, (void)la, (void)s, (void)u, (void)lu, (void)v, (void)lv, (void)p; \
        return tell(size, of_jacobi((size_t)m, (size_t)n)); \
    } \
    EXPORT int cusolverDn##T##gesvdjBatched_bufferSize(void *h, int job, int m, int n, void *a, int la, void *s, \
                                                       void *u, int lu, void *v, int lv, int *size, void *p, \
                                                       int batch) { \
        (void)h, (void)job, (void)a, (void)la, (void)s, (void)u, (void)lu, (void)v, (void)lv, (void)p; \
        return tell(size, (size_t)batch * of_jacobi((size_t)m, (size_t)n)); \
    } \
    EXPORT int cusolverDn##T##gesvdaStridedBatched_bufferSize( \
        void *h, int job, int rank, int m, int n, void *a, int la, long long da, void *s, long long ds, void *u, int lu, \
        long long du, void *v, int lv, long long dv, int *size, int batch) { \
        (void)h, (void)job, (void)rank, (void)a, (void)la, (void)da, (void)s, (void)ds, (void)u, (void)lu, (void)du; \
        (void)v, (void)lv, (void)dv; \
        return tell(size, (size_t)batch * of_jacobi((size_t)m, (size_t)n)); \
    }
SIZES(S, or, sy)
SIZES(D, or, sy)
SIZES(C, un, he)
SIZES(Z, un, he)

/* The newer interface: of all types, in bytes. */
EXPORT int cusolverDnXgeqrf_bufferSize(void *h, void *p, int64_t m, int64_t n, int type, void *a, int64_t la, int tt,
                                       void *t, int ct, size_t *device, size_t *host) {
    (void)h, (void)p, (void)a, (void)la, (void)tt, (void)t, (void)ct;
    return tell_bytes(device, host, type, panel((size_t)m, (size_t)n));
}
EXPORT int cusolverDnXpotrf_bufferSize(void *h, void *p, int part, int64_t n, int type, void *a, int64_t la, int ct,
                                       size_t *device, size_t *host) {
    (void)h, (void)p, (void)part, (void)a, (void)la, (void)ct;
    return tell_bytes(device, host, type, panel((size_t)n, 0));
}
EXPORT int cusolverDnXsytrs_bufferSize(void *h, int part, int64_t n, int64_t columns, int type, void *a, int64_t la,
                                       void *pivots, int bt, void *b, int64_t lb, size_t *device, size_t *host) {
    (void)h, (void)part, (void)a, (void)la, (void)pivots, (void)bt, (void)b, (void)lb;
    return tell_bytes(device, host, type, (size_t)n * (size_t)columns);
}
EXPORT int cusolverDnXsyevd_bufferSize(void *h, void *p, int job, int part, int64_t n, int type, void *a, int64_t la,
                                       int wt, void *w, int ct, size_t *device, size_t *host) {
    (void)h, (void)p, (void)job, (void)part, (void)a, (void)la, (void)wt, (void)w, (void)ct;
    return tell_bytes(device, host, type, of_eigenvalues((size_t)n));
}
EXPORT int cusolverDnXsyevBatched_bufferSize(void *h, void *p, int job, int part, int64_t n, int type, void *a,
                                             int64_t la, int wt, void *w, int ct, size_t *device, size_t *host,
                                             int64_t batch) {
    (void)h, (void)p, (void)job, (void)part, (void)a, (void)la, (void)wt, (void)w, (void)ct;
    return tell_bytes(device, host, type, (size_t)batch * of_jacobi((size_t)n, (size_t)n));
}
EXPORT int cusolverDnXgeev_bufferSize(void *h, void *p, int left, int right, int64_t n, int type, void *a, int64_t la,
                                      int wt, void *w, int lt, void *l, int64_t ll, int rt, void *r, int64_t lr, int ct,
                                      size_t *device, size_t *host) {
    (void)h, (void)p, (void)left, (void)right, (void)a, (void)la, (void)wt, (void)w, (void)lt, (void)l, (void)ll;
    (void)rt, (void)r, (void)lr, (void)ct;
    return tell_bytes(device, host, type, of_eigenvalues((size_t)n));
}

#define WORK(name) \
    EXPORT int name(struct solver *handle) { \
        count_captured_node(handle->stream); \
        return 0; \
    }
#define WORK_OF(T, Q, Y) \
    WORK(cusolverDn##T##geqrf) \
    WORK(cusolverDn##T##getrf) \
    WORK(cusolverDn##T##getrs) \
    WORK(cusolverDn##T##potrf) \
    WORK(cusolverDn##T##potrs) \
    WORK(cusolverDn##T##potrfBatched) \
    WORK(cusolverDn##T##potrsBatched) \
    WORK(cusolverDn##T##sytrf) \
    WORK(cusolverDn##T##Q##gqr) \
    WORK(cusolverDn##T##Q##mqr) \
    WORK(cusolverDn##T##Y##evd) \
    WORK(cusolverDn##T##Y##evj) \
    WORK(cusolverDn##T##Y##evjBatched) \
    WORK(cusolverDn##T##gesvd) \
    WORK(cusolverDn##T##gesvdj) \
    WORK(cusolverDn##T##gesvdjBatched) \
    WORK(cusolverDn##T##gesvdaStridedBatched)
WORK_OF(S, or, sy)
WORK_OF(D, or, sy)
WORK_OF(C, un, he)
WORK_OF(Z, un, he)
WORK(cusolverDnXgeqrf)
WORK(cusolverDnXpotrf)
WORK(cusolverDnXpotrs)
WORK(cusolverDnXsytrs)
WORK(cusolverDnXsyevd)
WORK(cusolverDnXsyevBatched)
WORK(cusolverDnXgeev)

/* What the files of the virtual GPU share: the few types of the CUDA ABI that cross the boundary, declared here so that
 * no CUDA headers are needed, and the functions that one file offers to the others.
 *
 * Enumerations of CUDA are `int` in this ABI, handles are pointers. Layouts that differ between CUDA 12 and 13 are in
 * device.c. CUDA_MAJOR comes from the compiler's command line.
 */
#ifndef BIGVIVIT_VIRTUAL_GPU_H
#define BIGVIVIT_VIRTUAL_GPU_H
#define _GNU_SOURCE
#include <stddef.h>
#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))
#define MAX_GPUS 64
#define MIB ((size_t)1 << 20)
#define LARGEST_VALUES MIB /* of what values.c keeps of one copy */

/* cudaError_t and CUresult agree on these numbers, but for their names. */
enum {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    NOT_READY = 600,
    PEER_ALREADY_ENABLED = 704,
    HOST_ALREADY_REGISTERED = 712,
    HOST_NOT_REGISTERED = 713,
    NOT_SUPPORTED = 801,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_UNMATCHED = 903,
};

/* The accelerator that BIGVIVIT_VIRTUAL_GPU describes; all virtual GPUs of a node are of one kind. */
struct card {
    char name[128];
    size_t memory;            /* bytes, as cudaMemGetInfo's total */
    size_t context;           /* bytes that a context takes */
    size_t communicator;      /* bytes that an NCCL communicator of two ranks and more takes */
    int gpus;                 /* in the node, before CUDA_VISIBLE_DEVICES */
    int capability;           /* 80 for 8.0 */
    int code;                 /* the compute capability whose code PyTorch's library holds for this one */
    int multiprocessors;
    size_t l2;                /* bytes */
    size_t shared_per_multiprocessor;
    size_t shared_per_block;  /* what a kernel may opt in to */
    int threads_per_multiprocessor;
    int blocks_per_multiprocessor;
};

/* device.c */
const struct card *card(void);
int visible_count(void);
int current_device(void);
int physical_device(int visible); /* its number in the node */
void write_uuid(int physical, char bytes[16]);
int fail(int code);               /* remember and return an error of the runtime */
_Noreturn void unanswered(const char *symbol);

/* memory.c */
enum memory_kind { UNKNOWN_MEMORY = 0, HOST_MEMORY = 1, DEVICE_MEMORY = 2, MANAGED_MEMORY = 3 }; /* cudaMemoryType */
struct range {
    uint64_t address;
    size_t size;    /* bytes that programs may use */
    size_t charged; /* bytes of the device that this takes */
    int device;
    enum memory_kind kind;
    int ours; /* of the host's, made here and not by the program */
};
int device_allocate(int device, size_t size, uint64_t *address);
int device_free(uint64_t address);
int find_range(uint64_t address, struct range *found);
int charge(int device, size_t size); /* OUT_OF_MEMORY where it does not fit */
void discharge(int device, size_t size);
void touch(int device); /* the context: made at the first call that needs one */
int context_active(int device);
void device_memory(int device, size_t *free_bytes, size_t *total_bytes);
int reserve_addresses(int device, size_t size, uint64_t *address);
void release_addresses(int device, uint64_t address, size_t size);
int add_range(struct range added);
void clear_bytes(void *to, size_t size); /* of the host's */
int remove_range(uint64_t address, struct range *removed);

/* values.c */
void set_values(uint64_t address, const void *bytes, size_t size);
int64_t get_values(uint64_t address, void *to, size_t size); /* how many bytes are known; the rest is zero */
void copy_values(uint64_t to, uint64_t from, size_t size);
void forget_values(uint64_t address, size_t size);

/* streams.c */
int stream_captures(void *stream);
int stream_may_wait(void *stream); /* CAPTURE_UNSUPPORTED while it is captured */
void count_captured_node(void *stream);

/* exchange.c */
#define LARGEST_MESSAGE ((size_t)1 << 18)
struct post_office;
struct post_office *open_post_office(const char *name, int rank, int size); /* NULL where that fails */
void close_post_office(struct post_office *office);
int fits_message(size_t size);
int send_message(struct post_office *office, int to, const void *bytes, int64_t size); /* bytes NULL: not known */
int receive_message(struct post_office *office, int from, void *bytes, int64_t size, int *known);

/* launches.c */
int launch(const void *function, void **arguments, unsigned rows, void *stream); /* rows: the grid's second extent */

/* results.c */
enum kernel_kind {
    NOT_YET_KNOWN, OTHER, FILLS, CONCATENATES, JOINS, COUNTS, SUMS_UP, KEEPS_ONE_OF_EQUALS, KEEPS_DISTINCT, COUNTS_DISTINCT,
    COMPARES, COMPARES_TENSORS, ORDERS, ADDS, ADDS_NUMBER, ADDS_SHORT_NUMBER, CASTS_TO_BOOLEAN,
    CASTS_TO_INTEGER, NEGATES, BOTH, EITHER, ALL, ANY, ADDS_UP, FINDS_MOST, MASKS, /* conditions.c */
};
enum kernel_kind kind_of_kernel(const char *mangled);
void note_kernel(enum kernel_kind kind, const char *mangled, void **arguments, unsigned rows);
void note_copy(size_t size); /* on the device, in this thread */
void read_result(void *to, size_t size); /* changes what is read back by the kernel launched last in this thread */


/* estimates.c */
enum estimate { CONVOLUTIONS, RECURRENT_PASSES, FOURIER_TRANSFORMS, DENSE_SOLVERS, SPARSE_PRODUCTS, CTC_LOSSES, ESTIMATES };
void count_estimate(enum estimate kind);

/* cudnn.c */
enum { CUDNN_BAD_PARAM = 2000, CUDNN_INTERNAL_ERROR = 4000 };
struct cudnn { /* a handle */
    void *stream;
};
int run_estimated(struct cudnn *handle, enum estimate kind); /* a call of the library that does nothing, and is counted */
struct shape { /* of a tensor: what its descriptor keeps */
    int type, count, sizes[8], strides[8];
};

/* convolutions.c */
struct layout { /* of a tensor in cuDNN's backend interface: batch or outputs first, channels second */
    int type, dimensions;
    int64_t sizes[8], strides[8];
};
struct convolved {
    enum { FORWARD, IMAGE_GRADIENT, WEIGHT_GRADIENT } kind;
    struct layout weight, image, output;
    int64_t stride[8];
};
size_t convolution_scratch(const struct convolved *convolved); /* on tensor cores */

/* conditions.c */
int goes_over_whole_tensors(const char *mangled);
enum kernel_kind kind_of_condition(const char *mangled);
void compute_condition(enum kernel_kind kind, const char *mangled, void **arguments);

#endif

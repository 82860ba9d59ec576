/* cuFFT: plans that know their scratch, transforms that do nothing.
 *
 * Answers: what torch.fft and torch.stft call. On an H100 (CUDA 13.0) lengths with small prime factors asked for no
 * scratch, in one, two and three dimensions, up to 16 MiB of output; the length 4,099, which is a prime, for two rows of
 * the next length beyond its double that has only factors up to five. Every transform is counted as an estimate.
 */
#include "virtual_gpu.h"
#include <pthread.h>
#include <stdlib.h>

enum { INVALID_PLAN = 1, FFT_ALLOCATION_FAILED = 2 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct plan {
    int used;
    void *stream;
} *plans; /* by their handles, which are numbers in this interface */
static int room;

EXPORT int cufftCreate(int *handle) {
    touch(current_device());
    pthread_mutex_lock(&lock);
    int free_one = 0;
    while (free_one < room && plans[free_one].used) free_one++;
    if (free_one == room) {
        int larger = room ? 2 * room : 64;
        struct plan *moved = realloc(plans, (size_t)larger * sizeof *plans);
        if (!moved) {
            pthread_mutex_unlock(&lock);
            return FFT_ALLOCATION_FAILED;
        }
        plans = moved;
        for (int i = room; i < larger; i++) plans[i].used = 0;
        room = larger;
    }
    plans[free_one] = (struct plan){1, NULL};
    *handle = free_one;
    pthread_mutex_unlock(&lock);
    return 0;
}

static int change(int handle, struct plan to) {
    pthread_mutex_lock(&lock);
    int known = handle >= 0 && handle < room && plans[handle].used;
    if (known) plans[handle] = to;
    pthread_mutex_unlock(&lock);
    return known ? 0 : INVALID_PLAN;
}
EXPORT int cufftDestroy(int handle) { return change(handle, (struct plan){0, NULL}); }
EXPORT int cufftSetStream(int handle, void *stream) { return change(handle, (struct plan){1, stream}); }
EXPORT int cufftSetAutoAllocation(int handle, int automatic) { return (void)handle, (void)automatic, 0; }
EXPORT int cufftSetWorkArea(int handle, void *area) { return (void)handle, (void)area, 0; }

enum { LARGEST_DIRECT_FACTOR = 127 }; /* NVIDIA's documentation: larger ones by Bluestein's algorithm */
static size_t largest_factor(size_t length) {
    size_t largest = 1;
    for (size_t factor = 2; length > 1 && factor * factor <= length; factor++)
        while (length % factor == 0) length /= factor, largest = factor;
    return length > largest ? length : largest;
}
static size_t smooth_length(size_t least) { /* factors two, three and five alone */
    while (largest_factor(least) > 5) least++;
    return least;
}

EXPORT int cufftXtMakePlanMany(int handle, int rank, const long long *sizes, const long long *in, long long in_stride,
                               long long in_distance, int in_type, const long long *out, long long out_stride,
                               long long out_distance, int out_type, long long batch, size_t *scratch, int type) {
    (void)handle, (void)in, (void)in_stride, (void)in_distance, (void)in_type;
    (void)out, (void)out_stride, (void)out_distance, (void)out_type;
    size_t elements = (size_t)batch, longest = 0;
    for (int i = 0; i < rank; i++) elements *= (size_t)sizes[i];
    for (int i = 0; i < rank; i++)
        if (largest_factor((size_t)sizes[i]) > LARGEST_DIRECT_FACTOR) {
            size_t rows = elements / (size_t)sizes[i] * 2 * smooth_length(2 * (size_t)sizes[i] - 1);
            if (rows > longest) longest = rows;
        }
    enum { HALF_COMPLEX = 6, DOUBLE_COMPLEX = 5, BFLOAT_COMPLEX = 15 }; /* cudaDataType */
    size_t half = type == HALF_COMPLEX || type == BFLOAT_COMPLEX;
    *scratch = longest * (half ? 4 : type == DOUBLE_COMPLEX ? 16 : 8);
    return 0;
}
EXPORT int cufftXtExec(int handle, void *in, void *out, int direction) {
    (void)in, (void)out, (void)direction;
    pthread_mutex_lock(&lock);
    void *stream = handle >= 0 && handle < room ? plans[handle].stream : NULL;
    pthread_mutex_unlock(&lock);
    count_estimate(FOURIER_TRANSFORMS);
    count_captured_node(stream);
    return 0;
}

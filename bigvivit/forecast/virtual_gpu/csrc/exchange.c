/* Between the processes of a group of ranks: small messages, through memory that they share.
 *
 * Each pair of ranks has a mailbox in each direction, which holds one message; a sender waits until the last one is
 * taken. The file behind it is removed as soon as all ranks have opened it. A rank that waits five minutes for another
 * gives up.
 */
#include "virtual_gpu.h"
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

struct mailbox {
    unsigned full;
    int64_t size; /* -1 for values that are not known */
    char bytes[LARGEST_MESSAGE];
};
struct post_office {
    int rank, size;
    size_t bytes;
    struct shared {
        int arrived;
        char padding[60];
        struct mailbox boxes[]; /* from * size + to */
    } *shared;
};

/* Wait until *word is a value; 0 when time is up. */
static int wait_for(const unsigned *word, unsigned value, int rank, int other) {
    for (int waited = 0; __atomic_load_n(word, __ATOMIC_ACQUIRE) != value; waited++) {
        if (waited > 3000000) {
            fprintf(stderr, "bigvivit's virtual GPU: rank %d has waited five minutes for rank %d\n", rank, other);
            return 0;
        }
        usleep(waited < 100 ? 10 : 100);
    }
    return 1;
}

struct post_office *open_post_office(const char *name, int rank, int size) {
    struct post_office *made = calloc(1, sizeof *made);
    char path[256];
    const char *folder = access("/dev/shm", W_OK) ? "/tmp" : "/dev/shm";
    snprintf(path, sizeof path, "%s/bigvivit-%u-%s", folder, (unsigned)getuid(), name);
    int file = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (!made || file < 0) return NULL;
    *made = (struct post_office){rank, size, sizeof(struct shared) + (size_t)size * (size_t)size * sizeof(struct mailbox), NULL};
    if (ftruncate(file, (off_t)made->bytes)) return NULL;
    made->shared = mmap(NULL, made->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (made->shared == MAP_FAILED) return NULL;
    if (__atomic_add_fetch(&made->shared->arrived, 1, __ATOMIC_ACQ_REL) == size) unlink(path);
    return wait_for((unsigned *)&made->shared->arrived, (unsigned)size, rank, -1) ? made : NULL;
}

void close_post_office(struct post_office *office) {
    if (!office) return;
    munmap(office->shared, office->bytes);
    free(office);
}

/* Whether a message of this size is sent at all; sender and receiver decide alike. */
int fits_message(size_t size) { return size <= LARGEST_MESSAGE; }

int send_message(struct post_office *office, int to, const void *bytes, int64_t size) {
    struct mailbox *box = &office->shared->boxes[office->rank * office->size + to];
    if (!wait_for(&box->full, 0, office->rank, to)) return 0;
    box->size = bytes ? size : -1;
    if (bytes) memcpy(box->bytes, bytes, (size_t)size);
    __atomic_store_n(&box->full, 1, __ATOMIC_RELEASE);
    return 1;
}

int receive_message(struct post_office *office, int from, void *bytes, int64_t size, int *known) {
    struct mailbox *box = &office->shared->boxes[from * office->size + office->rank];
    if (!wait_for(&box->full, 1, office->rank, from)) return 0;
    *known = box->size == size;
    if (*known) memcpy(bytes, box->bytes, (size_t)size);
    __atomic_store_n(&box->full, 0, __ATOMIC_RELEASE);
    return 1;
}

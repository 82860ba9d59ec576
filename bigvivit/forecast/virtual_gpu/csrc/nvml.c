/* NVML (libnvidia-ml.so.1), as PyTorch, pynvml and monitoring ask it: the same cards as the runtime shows.
 *
 * Answers: how many GPUs are in the node (CUDA_VISIBLE_DEVICES does not matter to NVML), names, memory as this process
 * uses it, compute capability, PCI addresses, UUIDs, driver versions; of readings a GPU at rest; this process as the only one.
 * Does not answer: other processes, NVLink, MIG: not supported, by NVML's own error.
 */
#include "virtual_gpu.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { NVML_INVALID_ARGUMENT = 2, NVML_NOT_SUPPORTED = 3, NVML_NOT_FOUND = 6, NVML_INSUFFICIENT_SIZE = 7 };

static int number(void *handle) { return (int)(uintptr_t)handle - 1; } /* in the node */

EXPORT int nvmlInit_v2(void) { return 0; }
EXPORT int nvmlInit(void) { return 0; }
EXPORT int nvmlInitWithFlags(unsigned flags) { return (void)flags, 0; }
EXPORT int nvmlShutdown(void) { return 0; }
EXPORT const char *nvmlErrorString(int error) {
    switch (error) {
    case 0: return "Success";
    case NVML_INVALID_ARGUMENT: return "Invalid Argument";
    case NVML_NOT_SUPPORTED: return "Not Supported";
    case NVML_NOT_FOUND: return "Not Found";
    default: return "Unknown Error";
    }
}
EXPORT int nvmlSystemGetDriverVersion(char *text, unsigned length) { return snprintf(text, length, "999.0"), 0; }
EXPORT int nvmlSystemGetNVMLVersion(char *text, unsigned length) { return snprintf(text, length, "13.999.0"), 0; }
EXPORT int nvmlSystemGetCudaDriverVersion_v2(int *version) { return *version = CUDA_VERSION_NUMBER, 0; }
EXPORT int nvmlSystemGetCudaDriverVersion(int *version) { return *version = CUDA_VERSION_NUMBER, 0; }
EXPORT int nvmlDeviceGetCount_v2(unsigned *count) { return *count = (unsigned)card()->gpus, 0; }
EXPORT int nvmlDeviceGetCount(unsigned *count) { return nvmlDeviceGetCount_v2(count); }
EXPORT int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
    if (index >= (unsigned)card()->gpus) return NVML_INVALID_ARGUMENT;
    return *handle = (void *)(uintptr_t)(index + 1), 0;
}
EXPORT int nvmlDeviceGetHandleByIndex(unsigned index, void **handle) {
    return nvmlDeviceGetHandleByIndex_v2(index, handle);
}
EXPORT int nvmlDeviceGetHandleByPciBusId_v2(const char *text, void **handle) {
    unsigned domain, bus;
    if (sscanf(text, "%x:%x", &domain, &bus) != 2 || bus == 0) return NVML_INVALID_ARGUMENT;
    return nvmlDeviceGetHandleByIndex_v2(bus - 1, handle);
}
EXPORT int nvmlDeviceGetUUID(void *handle, char *text, unsigned length) {
    char bytes[16]; /* as the runtime gives it */
    write_uuid(number(handle), bytes);
    char hex[40], *at = hex;
    for (int i = 0; i < 16; i++)
        at += sprintf(at, i == 4 || i == 6 || i == 8 || i == 10 ? "-%02x" : "%02x", (unsigned char)bytes[i]);
    return snprintf(text, length, "GPU-%s", hex), 0;
}
EXPORT int nvmlDeviceGetHandleByUUID(const char *text, void **handle) {
    for (int i = 0; i < card()->gpus; i++) {
        char uuid[64];
        *handle = (void *)(uintptr_t)(i + 1);
        nvmlDeviceGetUUID(*handle, uuid, sizeof uuid);
        if (!strcmp(uuid, text)) return 0;
    }
    return NVML_NOT_FOUND;
}
EXPORT int nvmlDeviceGetIndex(void *handle, unsigned *index) { return *index = (unsigned)number(handle), 0; }
EXPORT int nvmlDeviceGetMinorNumber(void *handle, unsigned *index) { return *index = (unsigned)number(handle), 0; }
EXPORT int nvmlDeviceGetName(void *handle, char *text, unsigned length) {
    return (void)handle, snprintf(text, length, "%s", card()->name), 0;
}
EXPORT int nvmlDeviceGetCudaComputeCapability(void *handle, int *major, int *minor) {
    (void)handle;
    return *major = card()->capability / 10, *minor = card()->capability % 10, 0;
}

/* What this process uses of a GPU, found by its number in the node; 0 for one that it does not see. */
static size_t used_bytes(int wanted) {
    extern size_t bigvivit_virtual_gpu_driver_bytes(int);
    for (int i = 0; i < visible_count(); i++)
        if (physical_device(i) == wanted) return bigvivit_virtual_gpu_driver_bytes(i);
    return 0;
}
struct memory {
    unsigned long long total, free, used;
};
EXPORT int nvmlDeviceGetMemoryInfo(void *handle, struct memory *to) {
    to->total = card()->memory;
    to->used = used_bytes(number(handle));
    to->free = to->total - to->used;
    return 0;
}
struct memory_v2 {
    unsigned version;
    unsigned long long total, reserved, free, used;
};
EXPORT int nvmlDeviceGetMemoryInfo_v2(void *handle, struct memory_v2 *to) {
    struct memory plain;
    nvmlDeviceGetMemoryInfo(handle, &plain);
    to->total = plain.total, to->reserved = 0, to->free = plain.free, to->used = plain.used;
    return 0;
}
struct pci { /* nvmlPciInfo_t */
    char legacy[16];
    unsigned domain, bus, device, device_id, subsystem_id;
    char id[32];
};
EXPORT int nvmlDeviceGetPciInfo_v3(void *handle, struct pci *to) {
    memset(to, 0, sizeof *to);
    to->bus = (unsigned)number(handle) + 1;
    snprintf(to->legacy, sizeof to->legacy, "0000:%02X:00.0", to->bus);
    snprintf(to->id, sizeof to->id, "00000000:%02X:00.0", to->bus);
    return 0;
}
struct utilization {
    unsigned gpu, memory;
};
EXPORT int nvmlDeviceGetUtilizationRates(void *handle, struct utilization *to) {
    return (void)handle, to->gpu = to->memory = 0, 0;
}
EXPORT int nvmlDeviceGetTemperature(void *handle, int sensor, unsigned *degrees) {
    return (void)handle, (void)sensor, *degrees = 30, 0;
}
EXPORT int nvmlDeviceGetPowerUsage(void *handle, unsigned *milliwatts) { return (void)handle, *milliwatts = 0, 0; }
EXPORT int nvmlDeviceGetEnforcedPowerLimit(void *handle, unsigned *milliwatts) {
    return (void)handle, *milliwatts = 0, NVML_NOT_SUPPORTED;
}
EXPORT int nvmlDeviceGetClockInfo(void *handle, int type, unsigned *mhz) {
    return (void)handle, (void)type, *mhz = 1410, 0;
}
EXPORT int nvmlDeviceGetMaxClockInfo(void *handle, int type, unsigned *mhz) {
    return nvmlDeviceGetClockInfo(handle, type, mhz);
}
EXPORT int nvmlDeviceGetMigMode(void *handle, unsigned *now, unsigned *next) {
    return (void)handle, (void)now, (void)next, NVML_NOT_SUPPORTED;
}
struct process { /* nvmlProcessInfo_v1_t; later versions have two numbers more */
    unsigned pid;
    unsigned long long used;
};
EXPORT int nvmlDeviceGetComputeRunningProcesses(void *handle, unsigned *count, struct process *to) {
    unsigned room = *count;
    *count = used_bytes(number(handle)) > 0;
    if (room < *count) return NVML_INSUFFICIENT_SIZE;
    if (*count) to->pid = (unsigned)getpid(), to->used = used_bytes(number(handle));
    return 0;
}
struct process_v3 {
    struct process process;
    unsigned gpu_instance, compute_instance;
};
EXPORT int nvmlDeviceGetComputeRunningProcesses_v3(void *handle, unsigned *count, struct process_v3 *to) {
    if (to) to->gpu_instance = to->compute_instance = 0xFFFFFFFFu; /* no MIG */
    return nvmlDeviceGetComputeRunningProcesses(handle, count, to ? &to->process : NULL);
}
EXPORT int nvmlDeviceGetGraphicsRunningProcesses_v3(void *handle, unsigned *count, struct process_v3 *to) {
    return (void)handle, (void)to, *count = 0, 0;
}
EXPORT int nvmlDeviceGetP2PStatus(void *a, void *b, int what, int *status) {
    return (void)a, (void)b, *status = what == 2 ? 1 : 0, 0; /* NVLink is not shown, reading and writing are */
}

/* No fabric: its state, as all that is behind the version, is zero. */
EXPORT int nvmlDeviceGetGpuFabricInfoV(void *handle, unsigned *version_and_more) {
    return (void)handle, memset(version_and_more + 1, 0, 32), 0;
}

#define NOT_OFFERED(name) \
    EXPORT int name(void) { return NVML_NOT_SUPPORTED; }
NOT_OFFERED(nvmlDeviceGetNvLinkState)
NOT_OFFERED(nvmlDeviceGetNvLinkRemoteDeviceType)
NOT_OFFERED(nvmlDeviceGetNvLinkRemotePciInfo_v2)
NOT_OFFERED(nvmlDeviceGetTotalEnergyConsumption)
NOT_OFFERED(nvmlDeviceGetCpuAffinity)
NOT_OFFERED(nvmlDeviceGetCpuAffinityWithinScope)

/* cuDNN's connectionist temporal classification: losses and gradients that are not computed.
 *
 * Answers: what torch.nn.functional.ctc_loss calls where PyTorch takes cuDNN for it (short integers as lengths, a blank of
 * zero), of labels on the host and on the GPU.
 * Its workspace is not known: taken is what both passes over time must keep, a number in fp32 for each step and each
 * label with the blanks around it. Each loss is counted as an estimate.
 */
#include "virtual_gpu.h"
#include <stdlib.h>

struct loss {
    int longest; /* label */
};
EXPORT int cudnnCreateCTCLossDescriptor(struct loss **to) {
    return (*to = calloc(1, sizeof **to)) ? 0 : CUDNN_INTERNAL_ERROR;
}
EXPORT int cudnnDestroyCTCLossDescriptor(struct loss *loss) { return free(loss), 0; }
EXPORT int cudnnSetCTCLossDescriptorEx(struct loss *loss, int type, int norm, int nan) {
    return (void)loss, (void)type, (void)norm, (void)nan, 0;
}
EXPORT int cudnnSetCTCLossDescriptor_v8(struct loss *loss, int type, int norm, int nan, int longest) {
    return (void)type, (void)norm, (void)nan, loss->longest = longest, 0;
}
EXPORT int cudnnSetCTCLossDescriptor_v9(struct loss *loss, int type, int norm, int mode, int longest) {
    return cudnnSetCTCLossDescriptor_v8(loss, type, norm, mode, longest);
}

static size_t workspace(const struct shape *scores, int longest) { /* steps, batch, labels */
    return 2 * (size_t)scores->sizes[0] * (size_t)scores->sizes[1] * (2 * (size_t)longest + 1) * sizeof(float);
}
EXPORT int cudnnGetCTCLossWorkspaceSize(void *handle, const struct shape *scores, void *gradients, const int *labels,
                                        const int *lengths, const int *steps, int algorithm, struct loss *loss,
                                        size_t *size) {
    (void)handle, (void)gradients, (void)labels, (void)steps, (void)algorithm, (void)loss;
    int longest = 0; /* these lie on the host */
    for (int i = 0; i < scores->sizes[1]; i++) longest = lengths[i] > longest ? lengths[i] : longest;
    return *size = workspace(scores, longest), 0;
}
EXPORT int cudnnGetCTCLossWorkspaceSize_v8(void *handle, int algorithm, struct loss *loss, const struct shape *scores,
                                           void *gradients, size_t *size) {
    (void)handle, (void)algorithm, (void)gradients;
    return *size = workspace(scores, loss->longest), 0;
}

EXPORT int cudnnCTCLoss(struct cudnn *handle) { return run_estimated(handle, CTC_LOSSES); }
EXPORT int cudnnCTCLoss_v8(struct cudnn *handle) { return run_estimated(handle, CTC_LOSSES); }

// ROCm 6 gives hipStreamWaitEvent a default that the packaged headers of 5.7 lack; upstream relies on it.
#pragma once
#include <hip/hip_runtime.h>
static inline hipError_t hipStreamWaitEvent(hipStream_t stream, hipEvent_t event) {
    return hipStreamWaitEvent(stream, event, 0);
}

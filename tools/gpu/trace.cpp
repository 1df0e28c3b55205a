// A time stamp for the begin and the end of every kernel, by CUPTI, for programs as they are: the CUDA driver loads this
// library into them.
//
//   g++ -O2 -shared -fPIC -I CUDA/extras/CUPTI/include -I CUDA/include tools/gpu/trace.cpp -L CUDA/extras/CUPTI/lib64 -lcupti -o trace.so
//   CUDA_INJECTION64_PATH=$PWD/trace.so TRACE_OUT=FILE llama-bench ... ; tools/gpu/layer.py FILE KERNEL
//
// TRACE_OUT gets lines "N number name" for each kernel function and "K begin end number grid_x grid_y grid_z threads"
// for each launch, in ns. Measuring takes time of its own, at most between tokens: compare layers, not tokens per second.
#include <cupti.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <string>
#include <unordered_map>

namespace {

FILE * out;
std::mutex lock;
std::unordered_map<std::string, int> numbers;

void CUPTIAPI give_buffer(uint8_t ** buffer, size_t * bytes, size_t * max_records) {
    *bytes = 8u << 20, *max_records = 0;
    *buffer = (uint8_t *) aligned_alloc(8, *bytes);
}

void CUPTIAPI take_buffer(CUcontext, uint32_t, uint8_t * buffer, size_t, size_t valid) {
    const std::lock_guard<std::mutex> guard(lock);
    CUpti_Activity * record = nullptr;
    while (cuptiActivityGetNextRecord(buffer, valid, &record) == CUPTI_SUCCESS) {
        if (record->kind != CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) {
            continue;
        }
        const auto * k = (const CUpti_ActivityKernel9 *) record;
        const auto [at, is_new] = numbers.emplace(k->name, (int) numbers.size());
        if (is_new) {
            fprintf(out, "N %d %s\n", at->second, k->name);
        }
        fprintf(out, "K %llu %llu %d %d %d %d %d\n", (unsigned long long) k->start, (unsigned long long) k->end,
                at->second, k->gridX, k->gridY, k->gridZ, k->blockX * k->blockY * k->blockZ);
    }
    free(buffer);
}

void finish() {
    cuptiActivityFlushAll(1);
    fclose(out);
}

} // namespace

extern "C" int InitializeInjection() {
    const char * path = getenv("TRACE_OUT");
    out = path ? fopen(path, "w") : nullptr;
    if (!out) {
        fprintf(stderr, "trace: TRACE_OUT names no file that can be written\n");
        exit(2);
    }
    if (cuptiActivityRegisterCallbacks(give_buffer, take_buffer) != CUPTI_SUCCESS ||
        cuptiActivityEnable(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) != CUPTI_SUCCESS) {
        fprintf(stderr, "trace: CUPTI does not start\n");
        exit(2);
    }
    atexit(finish);
    return 1;
}

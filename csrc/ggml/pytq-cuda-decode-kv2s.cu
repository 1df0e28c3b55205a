#define PYTQ_K          kv2s
#define PYTQ_OWN_V      kv2
#define PYTQ_EXTRA_V(X) X(kv3)
#include "pytq-cuda-decode.cuh"

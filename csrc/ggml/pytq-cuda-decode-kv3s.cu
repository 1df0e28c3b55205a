#define PYTQ_K          kv3s
#define PYTQ_OWN_V      kv3
#define PYTQ_EXTRA_V(X) X(kv2) X(kv4)
#include "pytq-cuda-decode.cuh"

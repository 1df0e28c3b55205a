#define PYTQ_K          kv4s
#define PYTQ_OWN_V      kv4
#define PYTQ_EXTRA_V(X) X(kv2) X(kv3)
#include "pytq-cuda-decode.cuh"

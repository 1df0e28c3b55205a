#define PYTQ_K          kv4
#define PYTQ_EXTRA_V(X) X(kv3) X(kv2)
#include "pytq-prefill.cuh"

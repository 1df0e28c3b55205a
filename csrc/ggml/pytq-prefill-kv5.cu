#define PYTQ_K          kv5
#define PYTQ_EXTRA_V(X) X(kv4) X(kv3)
#include "pytq-prefill.cuh"

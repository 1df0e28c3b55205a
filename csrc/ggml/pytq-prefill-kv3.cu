#define PYTQ_K kv3
#include "pytq-prefill.cuh"

#define PYTQ_K kv2
#include "pytq-prefill.cuh"

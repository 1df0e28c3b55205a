#define PYTQ_K kv3
#include "pytq-cuda-decode.cuh"

#define PYTQ_K kv2
#include "pytq-cuda-decode.cuh"

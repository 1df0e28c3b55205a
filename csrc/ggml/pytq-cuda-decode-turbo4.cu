#define PYTQ_K turbo4
#include "pytq-cuda-decode.cuh"

#define PYTQ_K turbo3
#include "pytq-cuda-decode.cuh"

#define PYTQ_K turbo2
#include "pytq-cuda-decode.cuh"

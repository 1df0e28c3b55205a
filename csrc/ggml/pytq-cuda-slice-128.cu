#define PYTQ_D 128
#include "pytq-cuda-slice.cuh"

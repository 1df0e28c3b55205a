#define PYTQ_D 64
#include "pytq-cuda-slice.cuh"

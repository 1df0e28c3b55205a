#define PYTQ_D 256
#include "pytq-cuda-slice.cuh"

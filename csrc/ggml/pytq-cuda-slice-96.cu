#define PYTQ_D 96
#include "pytq-cuda-slice.cuh"

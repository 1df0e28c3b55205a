#define PYTQ_D 80
#include "pytq-cuda-slice.cuh"

#define PYTQ_D 128
#include "pytq-portable.cuh"

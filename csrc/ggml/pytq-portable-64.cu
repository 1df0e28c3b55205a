#define PYTQ_D 64
#include "pytq-portable.cuh"

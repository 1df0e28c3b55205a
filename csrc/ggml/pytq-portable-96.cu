#define PYTQ_D 96
#include "pytq-portable.cuh"

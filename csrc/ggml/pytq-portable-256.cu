#define PYTQ_D 256
#include "pytq-portable.cuh"

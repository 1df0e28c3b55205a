#define PYTQ_D 80
#include "pytq-portable.cuh"

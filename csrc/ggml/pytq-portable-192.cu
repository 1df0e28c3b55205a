#define PYTQ_D 192
#include "pytq-portable.cuh"

#define PYTQ_K turbo4
#include "pytq-prefill.cuh"

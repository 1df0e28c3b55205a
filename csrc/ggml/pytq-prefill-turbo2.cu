#define PYTQ_K turbo2
#include "pytq-prefill.cuh"

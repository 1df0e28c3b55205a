#define PYTQ_K turbo3
#include "pytq-prefill.cuh"

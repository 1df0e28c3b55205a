// Stands in for ROCm's header when device code is compiled for the CPU.
#pragma once
#include "../shim.h"

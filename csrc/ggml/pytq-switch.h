// Switches of the CUDA and HIP backends in the environment, for comparisons; docs/performance-cuda.md lists them.
#pragma once

#include <cstdlib>

// Whether the variable is anything but 0, also where it is not set. (Callers keep the answer.)
inline bool pytq_switch(const char * name) {
    const char * e = getenv(name);
    return e == nullptr || atoi(e) != 0;
}

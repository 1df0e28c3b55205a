// Not written yet: the scalar tier serves.
#include "tiers.h"
extern "C" {
const pytq_cpu_tier_row *const pytq_tier_neon = nullptr;
}

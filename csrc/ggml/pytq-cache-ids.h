// Stand-ins for a cache type that is decided later. They make f16 as a choice differ from f16 as the default, which the
// numbers of llama_context_params alone cannot. Both lie in a family that types.def leaves free.
#pragma once

#define PYTQ_CACHE_UNSET 216 // nobody chose: what the model file stores, else f16
#define PYTQ_CACHE_MIXED 217 // the model file stores types per layer

// Instances of the prefill kernel for one family of keys; included once per family with PYTQ_K set, and
//   PYTQ_EXTRA_V    further families of values for head size 128: X(name) ...
#include "pytq-prefill.h"

#include "cuda/prefill-launch.cuh"

namespace {

constexpr int id_of(int family, int slot) {
    return PYTQ_TYPE_BASE + PYTQ_FAMILY_STRIDE * family + slot;
}

template <int KT, int VT> cudaError_t run(const pytq::prefill_params * p, int device, cudaStream_t stream) {
    return p ? pytq::prefill_launch<KT, VT>(*p, device, stream) : cudaSuccess;
}

} // namespace

#define PYTQ_CAT_(a, b)  a##b
#define PYTQ_CAT(a, b)   PYTQ_CAT_(a, b)
#define PYTQ_INDEX(name) PYTQ_CAT(PYTQ_FAMILY_INDEX_, name)

cudaError_t PYTQ_CAT(pytq_prefill_, PYTQ_K)(int k_type, int v_type, const pytq::prefill_params * p, int device,
                                            cudaStream_t stream) {
#define PYTQ_PAIR(k, v, slot)                                                                                          \
    if (k_type == id_of(k, slot) && v_type == id_of(v, slot)) {                                                        \
        return run<id_of(k, slot), id_of(v, slot)>(p, device, stream);                                                 \
    }
#define PYTQ_OWN(slot) PYTQ_PAIR(PYTQ_INDEX(PYTQ_K), PYTQ_INDEX(PYTQ_K), slot)
    PYTQ_PREFILL_SLOTS(PYTQ_OWN)
#undef PYTQ_OWN
#ifdef PYTQ_EXTRA_V
#define PYTQ_V(name) PYTQ_PAIR(PYTQ_INDEX(PYTQ_K), PYTQ_INDEX(name), 4)
    PYTQ_EXTRA_V(PYTQ_V)
#undef PYTQ_V
#endif
#undef PYTQ_PAIR
    return cudaErrorInvalidDeviceFunction;
}

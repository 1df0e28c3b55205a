// Runs HIP device code on the CPU (tests/shim/fibres.h) with waves of 32 or 64 lanes.
//
// When all fibres of a block wait, each wave carries out the exchange of those of its waiting lanes that have met the
// fewest so far, as an execution mask would; lanes that took another branch or have returned are not among them.
// Reading from such a lane ends the program: on a GPU the value would be undefined. When only barriers are left, all
// threads go on.
//
// The instructions of AMD GPUs are modelled by their ISA descriptions, so the AMD branches of csrc/cuda/device.cuh are
// what runs. Not seen here: real arithmetic of exp2 and tanh.
#pragma once

#include "../shim/fibres.h"

namespace shim {

// A lane wants the value of another, or (source -1) the mask of lanes that offer a nonzero value.
struct lane_offer {
    uint64_t value;
    int source;
};

inline bool exchange_lanes(fibre * const * lanes, int n) {
    long fewest = -1;
    for (int i = 0; i < n; i++) {
        if (lanes[i]->waits == wait::exchange && (fewest < 0 || lanes[i]->exchanges < fewest)) {
            fewest = lanes[i]->exchanges;
        }
    }
    if (fewest < 0) {
        return false;
    }
    uint64_t mask = 0;
    uint64_t offered[64] = {};
    bool active[64] = {};
    for (int i = 0; i < n; i++) {
        if (lanes[i]->waits == wait::exchange && lanes[i]->exchanges == fewest) {
            active[i] = true;
            offered[i] = ((const lane_offer *) lanes[i]->offer)->value;
            mask |= (uint64_t) (offered[i] != 0) << i;
        }
    }
    for (int i = 0; i < n; i++) {
        if (!active[i]) {
            continue;
        }
        lane_offer & o = *(lane_offer *) lanes[i]->offer;
        if (o.source >= 0) {
            if (o.source >= n || !active[o.source]) {
                fail("a lane reads from one that does not take part");
            }
            o.value = offered[o.source];
        } else {
            o.value = mask;
        }
        lanes[i]->waits = wait::none;
        lanes[i]->exchanges++;
    }
    return true;
}

inline void deliver(const copy &) {}

template <class X> X trade(X x, int source) {
    static_assert(sizeof(X) <= 8, "one register pair");
    lane_offer o = {0, source};
    memcpy(&o.value, &x, sizeof(X));
    gpu().running->offer = &o;
    gpu().pause(wait::exchange);
    X out;
    memcpy(&out, &o.value, sizeof(X));
    return out;
}

} // namespace shim

// ------------------------------------------------------------------------------------------------ lanes

inline int __lane_id() {
    return shim::lane();
}
inline uint64_t __ballot(bool b) {
    return shim::trade<uint64_t>(b, -1);
}
template <class X> X __shfl_xor(X x, int mask, int width) {
    const int l = shim::lane(), to = l ^ mask;
    return shim::trade(x, to / width == l / width ? to : l);
}
template <class X> X __shfl(X x, int lane, int width) {
    const int l = shim::lane();
    return shim::trade(x, l / width * width + (lane & (width - 1)));
}
template <class X> X __shfl_up(X x, unsigned delta, int width) {
    const int l = shim::lane(), to = l - (int) delta;
    return shim::trade(x, l % width >= (int) delta ? to : l);
}
template <class X> X __shfl_down(X x, unsigned delta, int width) {
    const int l = shim::lane(), to = l + (int) delta;
    return shim::trade(x, l % width + (int) delta < width ? to : l);
}
inline void __builtin_amdgcn_fence(int, const char *) {}
inline void __builtin_amdgcn_wave_barrier() {
    shim::trade(0, -1);
}

// ------------------------------------------------------------------------------------------------ instructions

// V_PERM_B32: byte i is selected from {a, b} (b holds bytes 0..3) by byte i of sel; only selectors 0..7 are used.
inline uint32_t __builtin_amdgcn_perm(uint32_t a, uint32_t b, uint32_t sel) {
    const uint64_t v = (uint64_t) a << 32 | b;
    uint32_t r = 0;
    for (int i = 0; i < 4; i++) {
        const uint32_t s = sel >> (8 * i) & 255u;
        if (s > 7) {
            shim::fail("v_perm_b32 with a selector above 7");
        }
        r |= (uint32_t) (v >> (8 * s) & 255u) << (8 * i);
    }
    return r;
}
// V_DOT4_I32_I8
inline int __builtin_amdgcn_sdot4(int a, int b, int c, bool) {
    for (int i = 0; i < 4; i++) {
        c += (int) (int8_t) (a >> (8 * i)) * (int) (int8_t) (b >> (8 * i));
    }
    return c;
}
// V_DOT4_I32_IU8
inline int __builtin_amdgcn_sudot4(bool sa, int a, bool sb, int b, int c, bool) {
    if (!sa || !sb) {
        shim::fail("sudot4 is used with signed bytes only");
    }
    return __builtin_amdgcn_sdot4(a, b, c, false);
}

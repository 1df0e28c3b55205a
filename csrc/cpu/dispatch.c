// Picks the CPU tier once and forwards pytq_quantize, pytq_dequantize and attention to it.
#include "tiers.h"

#include <math.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

unsigned pytq_cpu_caps(void) {
    unsigned caps = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
        caps |= PYTQ_CAP_AVX2;
    }
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") &&
        __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
        __builtin_cpu_supports("gfni")) {
        caps |= PYTQ_CAP_AVX512;
    }
#elif defined(__aarch64__) && defined(__linux__)
    if (getauxval(AT_HWCAP) & (1ul << 20)) { // HWCAP_ASIMDDP
        caps |= PYTQ_CAP_NEON;
    }
#elif defined(__aarch64__) && defined(__APPLE__)
    caps |= PYTQ_CAP_NEON; // every 64-bit Mac has the dot product instructions
#endif
    return caps;
}

static _Atomic(const pytq_cpu_tier_row *) current;

static void choose(unsigned caps) {
    const pytq_cpu_tier_row * const best_first[] = {pytq_tier_avx512, pytq_tier_avx2, pytq_tier_neon, pytq_tier_scalar};
    caps &= pytq_cpu_caps();
    for (size_t i = 0; i < sizeof(best_first) / sizeof(best_first[0]); i++) {
        const pytq_cpu_tier_row * t = best_first[i];
        if (t && (t->needs & caps) == t->needs) {
            atomic_store(&current, t);
            return;
        }
    }
}

void pytq_force_caps(unsigned caps) {
    choose(caps);
}

static unsigned caps_from_environment(void) {
    static const struct {
        const char * name;
        unsigned caps;
    } names[] = {
        {"scalar", 0}, {"avx2", PYTQ_CAP_AVX2}, {"avx512", PYTQ_CAP_AVX512 | PYTQ_CAP_AVX2}, {"neon", PYTQ_CAP_NEON}};
    const char * want = getenv("PYTQ_CPU_CAPS");
    if (!want || !*want) {
        return ~0u;
    }
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
        if (strcmp(want, names[i].name) == 0) {
            if ((names[i].caps & pytq_cpu_caps()) != names[i].caps) {
                fprintf(stderr, "pytq: this CPU lacks what PYTQ_CPU_CAPS=%s asks for\n", want);
            }
            return names[i].caps;
        }
    }
    fprintf(stderr, "pytq: PYTQ_CPU_CAPS=%s is not one of scalar, avx2, avx512, neon; ignored\n", want);
    return ~0u;
}

const pytq_cpu_tier_row * pytq_cpu_tier_current(void) {
    const pytq_cpu_tier_row * t = atomic_load(&current);
    if (!t) {
        choose(caps_from_environment());
        t = atomic_load(&current);
    }
    return t;
}

const char * pytq_cpu_tier(void) {
    return pytq_cpu_tier_current()->name;
}

void pytq_quantize(const pytq_type_info * t, const float * x, void * y, int64_t n) {
    pytq_cpu_tier_current()->quantize(t, x, y, n);
}

void pytq_dequantize(const pytq_type_info * t, const void * y, float * x, int64_t n) {
    pytq_cpu_tier_current()->dequantize(t, y, x, n);
}

void pytq_attn_item(const pytq_attn * a, const pytq_attn_plan * plan, int item, void * scratch, void * partials) {
    pytq_cpu_tier_current()->attn_item(a, plan, item, scratch, partials);
}

void pytq_attn_merge(const pytq_attn * a, const pytq_attn_plan * plan, int thread, int n_threads,
                     const void * partials) {
    pytq_cpu_tier_current()->attn_merge(a, plan, thread, n_threads, partials);
}

int pytq_fwht_supported(int64_t n) {
    return n >= 32 && n <= 512 && (n & (n - 1)) == 0;
}

void pytq_fwht(const float * x, float * y, int n, float scale) {
    pytq_cpu_tier_current()->fwht(x, y, n, scale);
}

void pytq_quantize_rotated(const pytq_type_info * t, const float * x, void * y, int64_t n) {
    enum { AT_ONCE = 4 }; // as many as the widest encoder follows together
    _Alignas(64) float rotated[AT_ONCE * PYTQ_MAX_HEAD_DIM];
    const pytq_cpu_tier_row * tier = pytq_cpu_tier_current();
    const int d = t->head_dim;
    const float scale = 1.0f / sqrtf((float) d);
    uint8_t * out = (uint8_t *) y;
    for (int64_t left = n / d; left > 0; left -= AT_ONCE) {
        const int vectors = left < AT_ONCE ? (int) left : AT_ONCE;
        for (int i = 0; i < vectors; i++, x += d) {
            tier->fwht(x, rotated + i * d, d, scale);
        }
        tier->quantize(t, rotated, out, (int64_t) vectors * d);
        out += vectors * t->block_bytes;
    }
}

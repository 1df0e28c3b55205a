// One source, several ISAs: the linker picks the widest clone that the CPU runs. Without this the file runs as
// compiled.
#ifndef PYTQ_CODECS_CLONES_H
#define PYTQ_CODECS_CLONES_H

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define PYTQ_CLONES      __attribute__((target_clones("default", "avx2", "avx512f")))
#define PYTQ_CLONES_FLAT __attribute__((flatten, target_clones("default", "avx2", "avx512f")))
#else
#define PYTQ_CLONES
#define PYTQ_CLONES_FLAT
#endif

#endif

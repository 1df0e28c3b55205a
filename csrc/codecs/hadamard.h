// Symmetric orthonormal Hadamard matrices (H = H^T, H H = I) for every head_dim that pytq serves.
#ifndef PYTQ_CODECS_HADAMARD_H
#define PYTQ_CODECS_HADAMARD_H

#ifdef __cplusplus
extern "C" {
#endif

// Order of the dense factor of H_n = H_base (x) H_2^k: 1, 12 or 20; 0 where n is none of 2^k, 12 * 2^k, 20 * 2^k.
int pytq_hadamard_base(int n);

// Fills out[n * n] with the orthonormal symmetric matrix; returns 0, or -1 (out untouched) for an unsupported n.
int pytq_hadamard(float * out, int n);

// x[n] := H x in n log2(n / base) additions plus the base factor. Order of the float operations, equal to the
// NumPy code in pytq/codec/rotation.py: butterflies of stride 1, 2, 4 ... inside each run of n / base values, then
// the base rows added left to right, then one product by float32(1 / sqrt(n)). Returns 0 or -1 as above.
int pytq_hadamard_apply(float * x, int n);

#ifdef __cplusplus
}
#endif

#endif

// Hadamard matrices of order 2^k, 12 * 2^k and 20 * 2^k.
//
// Orders 12 and 20 come from Paley's second construction with q = 5 and q = 9: for q = 1 mod 4 the quadratic
// character chi of GF(q) is even, so the conference matrix C of order q + 1 is symmetric, and so is
//     H = [ C + I   C - I ]
//         [ C - I  -C - I ]
// Symmetry matters: H is then its own inverse, and one matrix serves queries, keys and outputs.
// GF(9) = GF(3)[i] with i^2 = -1; there chi(a + bi) = (a + bi)^4 = a^2 + b^2 mod 3, read as 0, 1 or -1.
#include "hadamard.h"

#include "clones.h"

#include <math.h>

// Row i of the dense factor: bit j set where the entry is -1. The construction itself is in pytq/codec/rotation.py and
// a test compares.
// clang-format off
static const unsigned rows12[12] = {
    0x00040, 0x00698, 0x00d30, 0x00aa2, 0x00586, 0x00b0c, 0x00fc1, 0x009da, 0x003f4, 0x0076a,
    0x00e56, 0x00cec };
static const unsigned rows20[20] = {
    0x00400, 0xd8b60, 0xb52d0, 0x6e1b0, 0xc730c, 0xaaa8a, 0x71986, 0x3b06c, 0x5685a, 0x8d836,
    0xffc01, 0x27f62, 0x4bed4, 0x93db8, 0x3cf1c, 0x5d6aa, 0x9e5c6, 0xe4cec, 0xe955a, 0xf2636 };
// clang-format on
static const unsigned rows1[1] = {0};

static const unsigned * base_rows(int base) {
    return base == 1 ? rows1 : base == 12 ? rows12 : rows20;
}

int pytq_hadamard_base(int n) {
    if (n < 1) {
        return 0;
    }
    int odd = n;
    while (odd % 2 == 0) {
        odd /= 2;
    }
    if (odd == 1) {
        return 1;
    }
    // The dense factors 12 = 3 * 4 and 20 = 5 * 4 need two factors of two in n.
    return (odd == 3 || odd == 5) && n % 4 == 0 ? 4 * odd : 0;
}

static int parity(unsigned v) {
    int p = 0;
    for (; v != 0; v &= v - 1) {
        p ^= 1;
    }
    return p;
}

int pytq_hadamard(float * out, int n) {
    const int base = pytq_hadamard_base(n);
    if (base == 0) {
        return -1;
    }
    const unsigned * rows = base_rows(base);
    const int run = n / base;
    const float scale = (float) (1.0 / sqrt((double) n));
    for (int i = 0; i < n; i++) {
        for (int j = 0; j < n; j++) {
            const int sign = (int) (rows[i / run] >> (j / run) & 1u);
            const int flip = parity((unsigned) (i % run) & (unsigned) (j % run));
            out[(long) i * n + j] = sign != flip ? -scale : scale;
        }
    }
    return 0;
}

PYTQ_CLONES int pytq_hadamard_apply(float * x, int n) {
    const int base = pytq_hadamard_base(n);
    if (base == 0) {
        return -1;
    }
    const int run = n / base;
    for (int h = 1; h < run; h *= 2) {
        for (int i = 0; i < n; i += 2 * h) {
            for (int j = i; j < i + h; j++) {
                const float a = x[j];
                const float b = x[j + h];
                x[j] = a + b;
                x[j + h] = a - b;
            }
        }
    }
    if (base > 1) {
        const unsigned * rows = base_rows(base);
        // Eight columns at a time, so that the sums run in vector registers; run is a power of two.
        const int width = run < 8 ? run : 8;
        for (int j = 0; j < run; j += width) {
            float in[20][8];
            for (int r = 0; r < base; r++) {
                for (int c = 0; c < width; c++) {
                    in[r][c] = x[r * run + j + c];
                }
            }
            for (int r = 0; r < base; r++) {
                float sum[8] = {0.0f};
                for (int k = 0; k < base; k++) {
                    const float sign = rows[r] >> k & 1u ? -1.0f : 1.0f;
                    for (int c = 0; c < width; c++) {
                        sum[c] += sign * in[k][c];
                    }
                }
                for (int c = 0; c < width; c++) {
                    x[r * run + j + c] = sum[c];
                }
            }
        }
    }
    const float scale = (float) (1.0 / sqrt((double) n));
    for (int i = 0; i < n; i++) {
        x[i] *= scale;
    }
    return 0;
}

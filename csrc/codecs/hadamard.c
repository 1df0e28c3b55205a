// Hadamard matrices of order 2^k, 12 * 2^k and 20 * 2^k.
//
// Orders 12 and 20 come from Paley's second construction with q = 5 and q = 9: for q = 1 mod 4 the quadratic
// character chi of GF(q) is even, so the conference matrix C of order q + 1 is symmetric, and so is
//     H = [ C + I   C - I ]
//         [ C - I  -C - I ]
// Symmetry matters: H is then its own inverse, and one matrix serves queries, keys and outputs.
// GF(9) = GF(3)[i] with i^2 = -1; there chi(a + bi) = (a + bi)^4 = a^2 + b^2 mod 3, read as 0, 1 or -1.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=off")
#endif
#include "hadamard.h"

#include <math.h>

static int chi5(int x) {
    static const int table[5] = { 0, 1, -1, -1, 1 };
    return table[(x + 5) % 5];
}

static int chi9(int x, int y) {
    const int a = (x / 3 - y / 3 + 3) % 3;
    const int b = (x % 3 - y % 3 + 3) % 3;
    const int n = (a * a + b * b) % 3;
    return n == 2 ? -1 : n;
}

// Entry of the symmetric conference matrix of order q + 1: a border of ones around chi(x - y).
static int conference(int q, int i, int j) {
    if (i == j) {
        return 0;
    }
    if (i == 0 || j == 0) {
        return 1;
    }
    return q == 5 ? chi5(i - j) : chi9(i - 1, j - 1);
}

static int base_entry(int base, int i, int j) {
    if (base == 1) {
        return 1;
    }
    const int h   = base / 2;
    const int c   = conference(h - 1, i % h, j % h);
    const int eye = i % h == j % h;
    if (i < h && j < h) {
        return c + eye;
    }
    return i >= h && j >= h ? -c - eye : c - eye;
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
    const int   run   = n / base;
    const float scale = (float) (1.0 / sqrt((double) n));
    for (int i = 0; i < n; i++) {
        for (int j = 0; j < n; j++) {
            const int sign          = base_entry(base, i / run, j / run);
            const int flip          = parity((unsigned) (i % run) & (unsigned) (j % run));
            out[(long) i * n + j] = (sign < 0) != flip ? -scale : scale;
        }
    }
    return 0;
}

int pytq_hadamard_apply(float * x, int n) {
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
                x[j]          = a + b;
                x[j + h]      = a - b;
            }
        }
    }
    if (base > 1) {
        signed char sign[20 * 20];
        for (int i = 0; i < base; i++) {
            for (int j = 0; j < base; j++) {
                sign[i * base + j] = (signed char) base_entry(base, i, j);
            }
        }
        for (int j = 0; j < run; j++) {
            float in[20];
            for (int r = 0; r < base; r++) {
                in[r] = x[r * run + j];
            }
            for (int r = 0; r < base; r++) {
                // 0 + first term is exact up to the sign of zero, which NumPy's sum shares.
                float sum = 0.0f;
                for (int k = 0; k < base; k++) {
                    sum = sign[r * base + k] < 0 ? sum - in[k] : sum + in[k];
                }
                x[r * run + j] = sum;
            }
        }
    }
    const float scale = (float) (1.0 / sqrt((double) n));
    for (int i = 0; i < n; i++) {
        x[i] *= scale;
    }
    return 0;
}

// The encoder of the tiers without 512-bit registers; the bytes are the reference's. Included after tile.inl by a file that has
// declared a struct Lanes: vectors of Lanes::N floats and the few operations of the Viterbi step.
//
// Viterbi over 64 states in 64 / N registers, in place: after a step the state's bits have moved up by one and the new bit
// lives where the dropped one was, so state bit k is bit (k - t) mod 6 of the location (N * register + lane), and the two
// predecessors of a state differ in location bit b = 5 - t mod 6: two registers, or two lanes of one where 2^b < N.
// With X and Y the costs of the two branches, out = min(V + X, W + Y), W being V's partner.
namespace {

struct search_table {
    float level[4][16], limit[4][16];  // per subset; the scalar code has one
    int n_sub;
    float step;
    const pytq_codebook *cb;
};

struct encoder_tables {
    search_table table[2][6];
    alignas(64) typename Lanes::index x[6][64 / Lanes::N], y[6][64 / Lanes::N];
    encoder_tables() {
        memset((void *) table, 0, sizeof(table));
        for (int code = 0; code < 2; code++) {
            for (int bits = 1; bits <= 5; bits++) {
                const pytq_codebook *cb = pytq_codebook_get((enum pytq_code) code, bits);
                search_table *s = &table[code][bits];
                const int subsets = code == PYTQ_CODE_TRELLIS ? 4 : 1;
                s->n_sub = cb->n_levels / subsets;
                s->step = cb->step;
                s->cb = cb;
                for (int z = 0; z < subsets; z++) {
                    for (int i = 0; i < 16 && i < s->n_sub; i++) {
                        s->level[z][i] = (float) cb->levels[subsets * i + z];
                        s->limit[z][i] = i + 1 < s->n_sub ? 0.5f * ((float) cb->levels[subsets * i + z] + (float) cb->levels[subsets * (i + 1) + z])
                                                          : INFINITY;
                    }
                }
            }
        }
        for (int phase = 0; phase < 6; phase++) {
            for (int l = 0; l < 64; l++) {
                auto bit = [&](int k) { return l >> ((k - phase - 1 + 12) % 6) & 1; };
                const int subset = 2 * bit(5) + (bit(2) ^ bit(4));  // z1 = s0 ^ s5 ^ c, of which X holds s5 alone
                Lanes::set_index(x[phase][l / Lanes::N], l % Lanes::N, subset);
                Lanes::set_index(y[phase][l / Lanes::N], l % Lanes::N, subset ^ 2);
            }
        }
    }
};

const encoder_tables &tables() {
    static const encoder_tables t;
    return t;
}

// The reference's order: 16 lanes, folded by halves.
float sum_product(const float *a, const float *b, int n) {
    vf acc = vf{};
    int i = 0;
    for (; i + 16 <= n; i += 16) {
        const vf p = load(a + i) * load(b + i);
        acc = acc + p;
    }
    float lane[16];
    store(lane, acc);
    for (; i < n; i++) {
        const float p = a[i] * b[i];
        lane[i % 16] += p;
    }
    return hsum(load(lane));
}

// Number of limits below each of 16 values, and the level there. Plain loops: compilers turn them into compares and blends of
// the width at hand, which they do not do for comparisons of 64-byte vectors.
PYTQ_INLINE void nearest(const float *y, const float *limit, const float *level, int n_sub, int32_t *k, float *lv) {
    for (int j = 0; j < 16; j++) {
        k[j] = 0;
        lv[j] = level[0];
    }
    for (int i = 0; i + 1 < n_sub; i++) {
        const float lim = limit[i], next = level[i + 1];
        for (int j = 0; j < 16; j++) {
            k[j] += y[j] > lim ? 1 : 0;
            lv[j] = y[j] > lim ? next : lv[j];
        }
    }
}

struct viterbi_work {
    alignas(64) float cost[PYTQ_MAX_HEAD_DIM + 16][4];
    uint8_t best[4][PYTQ_MAX_HEAD_DIM + 16];
    alignas(64) uint8_t decision[PYTQ_MAX_HEAD_DIM][64 / Lanes::decision_bits];
};

template <int PHASE>
PYTQ_INLINE void viterbi_step(const encoder_tables &tab, const float *cost, typename Lanes::f *m, uint8_t *decision) {
    constexpr int B = 5 - PHASE, R = 64 / Lanes::N;
    const auto c = Lanes::broadcast4(cost);
    if ((1 << B) >= Lanes::N) {
        constexpr int D = (1 << B) >= Lanes::N ? (1 << B) / Lanes::N : 1;
        for (int lo = 0; lo < R; lo++) {
            if (lo & D) {
                continue;
            }
            const auto x = Lanes::pick(c, tab.x[PHASE][lo]), y = Lanes::pick(c, tab.y[PHASE][lo]);
            const auto ax = Lanes::add(m[lo], x), by = Lanes::add(m[lo + D], y);
            const auto ay = Lanes::add(m[lo], y), bx = Lanes::add(m[lo + D], x);
            Lanes::template decide<-1>(decision, lo, by, ax);
            Lanes::template decide<-1>(decision, lo + D, bx, ay);
            m[lo] = Lanes::min(by, ax);
            m[lo + D] = Lanes::min(bx, ay);
        }
    } else {
        for (int r = 0; r < R; r++) {
            const auto vx = Lanes::add(m[r], Lanes::pick(c, tab.x[PHASE][r]));
            const auto wy = Lanes::add(Lanes::template swap<B>(m[r]), Lanes::pick(c, tab.y[PHASE][r]));
            Lanes::template decide<B>(decision, r, wy, vx);
            m[r] = Lanes::min(vx, wy);
        }
    }
}

// Coded bits of the best path.
void viterbi(viterbi_work *w, int d, uint64_t *u) {
    const encoder_tables &tab = tables();
    alignas(64) float first[64];
    for (int i = 0; i < 64; i++) {
        first[i] = i ? 1e30f : 0.0f;
    }
    typename Lanes::f m[64 / Lanes::N];
    for (int r = 0; r < 64 / Lanes::N; r++) {
        m[r] = Lanes::load(first + r * Lanes::N);
    }
    for (int t = 0; t < d; t++) {
        switch (t % 6) {
            case 0: viterbi_step<0>(tab, w->cost[t], m, w->decision[t]); break;
            case 1: viterbi_step<1>(tab, w->cost[t], m, w->decision[t]); break;
            case 2: viterbi_step<2>(tab, w->cost[t], m, w->decision[t]); break;
            case 3: viterbi_step<3>(tab, w->cost[t], m, w->decision[t]); break;
            case 4: viterbi_step<4>(tab, w->cost[t], m, w->decision[t]); break;
            default: viterbi_step<5>(tab, w->cost[t], m, w->decision[t]); break;
        }
    }
    alignas(64) float last[64];
    for (int r = 0; r < 64 / Lanes::N; r++) {
        Lanes::store(last + r * Lanes::N, m[r]);
    }
    // of equal metrics the lowest state wins; state bit k is location bit (k - d) mod 6
    unsigned loc = 0;
    for (int state = 0; state < 64; state++) {
        unsigned l = 0;
        for (int k = 0; k < 6; k++) {
            l |= (unsigned) (state >> k & 1) << ((k - d % 6 + 6) % 6);
        }
        loc = state == 0 || last[l] < last[loc] ? l : loc;
    }
    memset(u, 0, 4 * sizeof(*u));
    for (int b = 5 - (d - 1) % 6, i = d - 1; i >= 0; i--) {
        u[i >> 6] |= (uint64_t) (loc >> b & 1) << (i & 63);
        loc = (loc & ~(1u << b)) | Lanes::decision(w->decision[i], loc) << b;
        b = b == 5 ? 0 : b + 1;
    }
}

int log8_encode(float sigma) {
    static const float limit[8] = {0x1.0b5586p+0f, 0x1.2387a6p+0f, 0x1.3dea64p+0f, 0x1.5ab07ep+0f,
                                   0x1.7a1148p+0f, 0x1.9c4918p+0f, 0x1.c199bep+0f, 0x1.ea4afap+0f};
    if (!(sigma > 0.0f)) {
        return 0;
    }
    int exponent, k = 0;
    const float m = frexpf(sigma, &exponent) * 2.0f;
    for (int i = 0; i < 8; i++) {
        k += m >= limit[i];
    }
    const int e = 8 * (exponent - 1) + k + PYTQ_LOG8_BIAS;
    return e < 1 ? 0 : e > 255 ? 255 : e;
}

// Bit `bit` of n bytes, as a plane.
void pack_plane(const uint8_t *values, int bit, int n, uint8_t *plane) {
    for (int i = 0; i < n; i += 8) {
        uint64_t v;
        memcpy(&v, values + i, 8);
        plane[i / 8] = (uint8_t) (((v >> bit) & 0x0101010101010101ull) * 0x0102040810204080ull >> 56);
    }
}

void encode_trellis(const pytq_type_info *t, const float *x, uint8_t *out) {
    const float *log8 = pytq_log8_table();
    const int d = t->head_dim;
    viterbi_work w;
    int e[PYTQ_MAX_GROUPS];
    for (int g = 0, at = 0; g < t->n_groups; at += t->group_len[g++]) {
        const int n = t->group_len[g];
        const search_table &s = tables().table[PYTQ_CODE_TRELLIS][t->group_bits[g]];
        e[g] = log8_encode(sqrtf(sum_product(x + at, x + at, n) / (float) n));
        const float f = log8[e[g]] * s.step;
        const float inv = e[g] ? 1.0f / f : 0.0f, weight = t->n_groups == 1 ? 1.0f : f * f;
        // groups go in order and the next one overwrites what a last step of 16 wrote too far
        for (int i = 0; i < n; i += 16) {
            float y[16] = {0};
            memcpy(y, x + at + i, (size_t) (n - i < 16 ? n - i : 16) * sizeof(float));
            for (int j = 0; j < 16; j++) {
                y[j] *= inv;
            }
            for (int z = 0; z < 4; z++) {
                float level[16];
                int32_t k[16];
                nearest(y, s.limit[z], s.level[z], s.n_sub, k, level);
                for (int j = 0; j < 16; j++) {
                    const float err = y[j] - level[j], e2 = err * err;
                    w.cost[at + i + j][z] = e2 * weight;
                    w.best[z][at + i + j] = (uint8_t) k[j];
                }
            }
        }
    }
    uint64_t u[4];
    viterbi(&w, d, u);
    memcpy(out + t->plane_off[0], u, (size_t) d / 8);

    float level[PYTQ_MAX_HEAD_DIM];
    uint8_t plain[PYTQ_MAX_HEAD_DIM];
    uint64_t before = 0;
    for (int word = 0; 64 * word < d; word++) {
        const uint64_t now = u[word];
        auto delayed = [&](int k) { return now << k | before >> (64 - k); };
        const uint64_t z1 = now ^ delayed(5) ^ delayed(6), z0 = delayed(2) ^ delayed(4);
        before = now;
        for (int i = 64 * word; i < d && i < 64 * word + 64; i++) {
            const int z = (int) (2 * (z1 >> (i & 63) & 1) + (z0 >> (i & 63) & 1));
            plain[i] = w.best[z][i];
            level[i] = (float) z;  // until the group's table is known
        }
    }
    for (int g = 0, at = 0; g < t->n_groups; at += t->group_len[g++]) {
        const int n = t->group_len[g];
        const search_table &s = tables().table[PYTQ_CODE_TRELLIS][t->group_bits[g]];
        for (int i = at; i < at + n; i++) {
            level[i] = s.level[(int) level[i]][plain[i]];
        }
        const float xl = sum_product(x + at, level + at, n), ll = sum_product(level + at, level + at, n);
        int best = e[g];
        float best_err = 0.0f;
        for (int k = 0; k < 3 && e[g] > 0; k++) {
            const int cand = e[g] + (k == 1 ? -1 : k == 2 ? 1 : 0);
            if (cand < 1 || cand > 255) {
                continue;
            }
            const float f = log8[cand] * s.step, fll = f * ll, err = f * (fll - 2.0f * xl);
            if (k == 0 || err < best_err) {
                best = cand;
                best_err = err;
            }
        }
        out[g] = (uint8_t) best;
    }
    for (int p = 1; p < t->n_planes; p++) {
        pack_plane(plain, p - 1, t->plane_len[p], out + t->plane_off[p]);
    }
}

void encode_scalar(const pytq_type_info *t, const float *x, uint8_t *out) {
    const int d = t->head_dim;
    const search_table &s = tables().table[PYTQ_CODE_SCALAR][t->group_bits[0]];
    float level[PYTQ_MAX_HEAD_DIM];
    uint8_t index[PYTQ_MAX_HEAD_DIM];
    const float ss = sum_product(x, x, d);
    const float inv = 1.0f / (sqrtf(ss / (float) d) * s.step);
    for (int i = 0; i < d; i += 16) {
        float y[16];
        int32_t k[16];
        store(y, load(x + i) * inv);
        nearest(y, s.limit[0], s.level[0], s.n_sub, k, level + i);
        for (int j = 0; j < 16; j++) {
            index[i + j] = (uint8_t) k[j];
        }
    }
    for (int p = 0; p < t->n_planes; p++) {
        pack_plane(index, p, t->plane_len[p], out + t->plane_off[p]);
    }
    const float ll = sum_product(level, level, d);
    const uint16_t h = Lanes::half_of(sqrtf(ss / ll) / s.step);
    memcpy(out, &h, 2);
}

void encode(const pytq_type_info *t, const float *x, void *y, int64_t n) {
    uint8_t *out = (uint8_t *) y;
    for (int64_t at = 0; at < n; at += t->head_dim, out += t->block_bytes, x += t->head_dim) {
        float m = 0.0f;
        bool finite = true;
        for (int i = 0; i < t->head_dim; i++) {
            const float a = fabsf(x[i]);
            finite &= a <= 3.4028234e38f;
            m = a > m ? a : m;
        }
        if (!finite || !(m >= 0x1p-40f && m <= 0x1p40f)) {
            pytq_quantize_ref(t, x, out, t->head_dim);  // zero, non-finite or out of range: rare
        } else if (t->code == PYTQ_CODE_SCALAR) {
            encode_scalar(t, x, out);
        } else {
            encode_trellis(t, x, out);
        }
    }
}

// ------------------------------------------------------------------------------------------------ levels of one block

// Index rows of word `word` of a block: z0 z1 plane1 .. (trellis) or plane0 plane1 .. (scalar); before: the coded bits of the
// word in front.
template <bool TRELLIS>
PYTQ_INLINE void index_rows(const pytq_type_info *t, const uint8_t *in, int word, int n_planes, uint64_t *before, uint64_t *row) {
    for (int p = 0; p < n_planes; p++) {
        const int n = t->plane_len[p] / 8 - 8 * word;
        const uint8_t *from = in + t->plane_off[p] + 8 * word;
        uint64_t v = 0;
        if (n >= 8) {
            memcpy(&v, from, 8);
        } else {
            for (int i = 0; i < n; i++) {  // not memcpy: a call per plane costs more than the rest
                v |= (uint64_t) from[i] << (8 * i);
            }
        }
        row[p + TRELLIS] = v;
    }
    if (TRELLIS) {
        const uint64_t u = row[1], b = *before;
        row[1] = u ^ (u << 5 | b >> 59) ^ (u << 6 | b >> 58);
        row[0] = (u << 2 | b >> 62) ^ (u << 4 | b >> 60);
        *before = u;
    }
}

template <bool TRELLIS, int NP>
void levels_of_one_group(const pytq_type_info *t, const int8_t (*table)[64], const uint8_t *in, int8_t *out) {
    uint64_t before = 0;
    for (int word = 0; 64 * word < t->head_dim; word++) {
        uint64_t row[NP + TRELLIS];
        index_rows<TRELLIS>(t, in, word, NP, &before, row);
        for (int i = 0; i < 64 && 64 * word + i < t->head_dim; i += Lanes::bytes) {
            Lanes::look_up(Lanes::expand(row, NP + TRELLIS, i), table[0], NP + TRELLIS, out, 64 * word + i, 0);
        }
    }
}

void levels_of_groups(const pytq_type_info *t, const int8_t (*table)[64], const uint8_t *in, int8_t *out) {
    uint64_t before = 0;
    int g = 0, end = t->group_len[0];
    for (int word = 0; 64 * word < t->head_dim; word++) {
        uint64_t row[PYTQ_MAX_PLANES + 1] = {0};
        index_rows<true>(t, in, word, t->n_planes, &before, row);
        for (int i = 0; i < 64 && 64 * word + i < t->head_dim; i += Lanes::bytes) {
            const auto index = Lanes::expand(row, t->n_planes + 1, i);
            const int base = 64 * word + i, stop = base + Lanes::bytes;
            // a step may hold the end of one group and the start of the next, which overwrites
            for (int at = base; at < stop && g < t->n_groups;) {
                Lanes::look_up(index, table[g], t->group_bits[g] + 1, out, base, at - base);
                at = end < stop ? end : stop;
                if (at == end && ++g < t->n_groups) {
                    end += t->group_len[g];
                }
            }
        }
    }
}

// int8 levels in natural order; out has 64 bytes more than head_dim.
void block_levels(const pytq_type_info *t, const int8_t (*table)[64], const uint8_t *in, int8_t *out) {
    if (t->n_groups > 1) {
        levels_of_groups(t, table, in, out);
    } else if (t->code == PYTQ_CODE_TRELLIS) {
        switch (t->n_planes) {
            case 2: levels_of_one_group<true, 2>(t, table, in, out); break;
            case 3: levels_of_one_group<true, 3>(t, table, in, out); break;
            case 4: levels_of_one_group<true, 4>(t, table, in, out); break;
            default: levels_of_one_group<true, 5>(t, table, in, out); break;
        }
    } else {
        switch (t->n_planes) {
            case 2: levels_of_one_group<false, 2>(t, table, in, out); break;
            case 3: levels_of_one_group<false, 3>(t, table, in, out); break;
            default: levels_of_one_group<false, 4>(t, table, in, out); break;
        }
    }
}

void level_tables(const pytq_type_info *t, int8_t (*out)[64]) {
    for (int g = 0; g < t->n_groups; g++) {
        const pytq_codebook *cb = pytq_codebook_get(t->code, t->group_bits[g]);
        for (int i = 0; i < 64; i++) {
            out[g][i] = cb->levels[i % cb->n_levels];
        }
    }
}

float block_factor(const pytq_type_info *t, const uint8_t *in, int g) {
    const float step = pytq_codebook_get(t->code, t->group_bits[g])->step;
    if (t->scale == PYTQ_SCALE_LOG8) {
        return pytq_log8_table()[in[g]] * step;
    }
    return Lanes::float_of((uint16_t) (in[2 * g] | in[2 * g + 1] << 8)) * step;
}

void decode(const pytq_type_info *t, const void *y, float *x, int64_t n) {
    const uint8_t *in = (const uint8_t *) y;
    int8_t table[PYTQ_MAX_GROUPS][64];
    level_tables(t, table);
    for (int64_t at = 0; at < n; at += t->head_dim, in += t->block_bytes, x += t->head_dim) {
        int8_t level[PYTQ_MAX_HEAD_DIM + 64];
        block_levels(t, table, in, level);
        for (int g = 0, i = 0; g < t->n_groups; g++) {
            const float factor = block_factor(t, in, g);
            for (const int end = i + t->group_len[g]; i < end; i++) {
                x[i] = factor * (float) level[i];
            }
        }
    }
}

// Rows of a tile as levels: 16 tokens of at most d bytes; tokens past n are zero.
void rows_of_levels(const pytq_type_info *t, const int8_t (*table)[64], const uint8_t *rows, size_t stride, int at, int n, int count,
                                int8_t (*out)[PYTQ_MAX_HEAD_DIM + 64]) {
    for (int i = 0; i < count; i++) {
        if (at + i < n) {
            block_levels(t, table, rows + (size_t) (at + i) * stride, out[i]);
        } else {
            memset(out[i], 0, (size_t) t->head_dim);
        }
    }
}

// Factors scale * step of one group; zero past n.
void tile_scales(const pytq_type_info *t, int group, const uint8_t *rows, size_t stride, int n, float *out) {
    const float step = pytq_codebook_get(t->code, t->group_bits[group])->step;
    const float *table = pytq_log8_table();
    for (int i = 0; i < n; i++) {
        const uint8_t *b = rows + (size_t) i * stride;
        out[i] = (t->scale == PYTQ_SCALE_LOG8 ? table[b[group]] : Lanes::float_of((uint16_t) (b[0] | b[1] << 8))) * step;
    }
    for (int i = n; i < T; i++) {
        out[i] = 0.0f;
    }
}

}  // namespace

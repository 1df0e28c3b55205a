// pytq_causal_mask_row against the three questions per cell that it saves, on random caches of upstream's own cells.
// Prints how many rows were filled, how many refused, and how many were wrong.
#include "llama-kv-cells.h"
#include "pytq-kv-mask.h"

#include <cstdio>
#include <random>

static std::mt19937 generator(7);

static int below(int n) {
    return (int) (generator() % (unsigned) n);
}

struct totals {
    int filled = 0, refused = 0, wrong = 0, holes = 0, later = 0, short_rows = 0, unowned = 0;
};

static void fill(llama_kv_cells & cells, int n_cells, int n_seq, bool all_in_first, bool unowned) {
    cells.resize(n_cells);
    const int n_used = below(n_cells + 1), longest = 1 + below(2 * n_cells);
    for (int j = 0; j < n_used; j++) {
        const uint32_t i = below(4) ? j : below(n_cells);
        if (!cells.is_empty(i)) {
            continue;
        }
        cells.pos_set(i, below(8) ? j : below(longest));
        if (unowned && !below(n_cells)) {
            continue;
        }
        if (all_in_first || n_seq == 1 || below(n_cells)) {
            cells.seq_add(i, 0);
        }
        for (int s = 1; s < n_seq; s++) {
            if (!below(3)) {
                cells.seq_add(i, s);
            }
        }
    }
    // what a server does between requests
    for (int j = 0; j < n_cells; j++) {
        if (cells.is_empty(j)) {
            continue;
        }
        if (!below(12)) {
            cells.rm(j);
        } else if (!below(12) && cells.seq_has(j, 0) && !all_in_first) {
            cells.seq_rm(j, 0);
        } else if (!below(12)) {
            cells.pos_add(j, below(9) - 4);
        }
    }
}

template <class T> static void compare(const llama_kv_cells & cells, llama_seq_id seq, T keep, T drop, totals & sum) {
    const T untouched = (T) 77;
    const llama_pos pos = below(8) ? below((int) cells.size()) : cells.seq_pos_max(seq);
    const int n_kv = below(3) ? (int) cells.used_max_p1() : below((int) cells.size() + 1);
    std::vector<T> row(cells.size() + 2, untouched), expected = row;
    bool mine = true;
    for (uint32_t j = 0; j < cells.size(); j++) {
        mine = mine && (cells.is_empty(j) || cells.seq_has(j, seq));
        sum.unowned += !cells.is_empty(j) && cells.seq_count(j) == 0;
    }
    for (int j = 0; j < n_kv && mine; j++) {
        const bool seen = !cells.is_empty(j) && cells.seq_has(j, seq) && cells.pos_get(j) <= pos;
        expected[j + 1] = seen ? keep : drop;
        sum.holes += cells.is_empty(j);
        sum.later += !cells.is_empty(j) && cells.pos_get(j) > pos;
    }
    const bool done = pytq_causal_mask_row(cells, seq, pos, (int64_t) n_kv, keep, drop, row.data() + 1);
    sum.short_rows += done && n_kv < (int) cells.used_max_p1();
    (done ? sum.filled : sum.refused)++;
    sum.wrong += done != mine || memcmp(row.data(), expected.data(), row.size() * sizeof(T)) != 0;
}

int main() {
    totals sum;
    for (int i = 0; i < 4000; i++) {
        llama_kv_cells cells;
        const int n_seq = 1 + below(4);
        fill(cells, 1 + below(96), n_seq, below(2), !below(3));
        for (llama_seq_id seq = 0; seq < n_seq; seq++) {
            compare<uint16_t>(cells, seq, 0, 0xfc00, sum);
            compare<float>(cells, seq, 0.0f, -INFINITY, sum);
        }
    }
    printf("filled %d refused %d wrong %d holes %d later %d short_rows %d unowned %d\n", sum.filled, sum.refused,
           sum.wrong, sum.holes, sum.later, sum.short_rows, sum.unowned);
}

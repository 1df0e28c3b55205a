// Executes the decoder of the prefill kernel (csrc/cuda/prefill-tiles.cuh) on the CPU under the shim of tests/hip and
// compares its tiles with the C reference.
//
// usage: prefill_tiles
// Prints one line per type: its name, the number of wrong levels of keys, and the largest error of a value relative to
// its block's largest.
#include <cmath> // the shim's macros are not for the library's headers
#include <random>

#include <hip/hip_runtime.h>

inline float __log2f(float x) {
    return std::log2(x);
}

#include "cuda/prefill-tiles.cuh"

namespace pytq {
alignas(16) thread_local char decode_smem[65536];
} // namespace pytq

namespace {

constexpr int rows = 64, warp_tokens = 16, raw_at = 40000; // tokens of a tile and of a warp; where blocks lie

// One warp decodes its 16 tokens of a tile, as in attention-prefill.cuh. lead: where blocks begin modulo 16.
template <int ID, bool VALUES> void decode_tile(const uint8_t * blocks, int nb1, int lead, int warp, uint16_t * out) {
    using T = pytq::type<ID>;
    using L = pytq::tile_lanes<T>;
    const int lane = threadIdx.x;
    // an address with the alignment of the first block
    const char * const base = (const char *) (uintptr_t) (4096 + lead);
    const auto at = [&](int t) {
        return raw_at + t * pytq::raw_pitch<T>() + (int) ((uintptr_t) (base + t * nb1) & 15);
    };
    if (lane < warp_tokens) {
        memcpy(pytq::decode_smem + at(lane), blocks + (warp * warp_tokens + lane) * T::block_bytes, T::block_bytes);
    }
    __syncthreads();
    pytq::tile_words<T, warp_tokens, VALUES> words;
    words.init(raw_at, base, nb1, lane);
    // factors of the values, as another warp leaves them
    const int factors = raw_at - 4 * warp_tokens;
    if (lane < warp_tokens) {
        const float f = pytq::block_scale<T, 0>(at(lane)) * pytq::book<T::code, T::bits>::step();
        *(uint32_t *) (pytq::decode_smem + factors + 4 * lane) = pytq::half_factor(f);
    }
    __syncthreads();
    words.load(0, factors, lane);
    pytq::offset_table<T> table;
    table.init(0);
    int unit_at[4];
    for (int k = 0; k < 4; k++) {
        unit_at[k] = pytq::tile_at(rows, warp_tokens * warp + L::token(lane), 4 * L::word(lane) + k);
    }
    words.decode(table, pytq::make_hidden_constants(), 0x01010101u - 1u, unit_at, 0, lane);
    __syncthreads();
    // read as the matrix unit does: by rows and columns of the swizzled tile
    for (int i = lane; i < warp_tokens * T::d; i += 32) {
        const int t = warp * warp_tokens + i / T::d, c = i % T::d, column = pytq::tile_column(c);
        if (pytq::tile_coordinate(column) != c) {
            shim::fail("columns are not a permutation");
        }
        memcpy(&out[t * T::d + c], pytq::decode_smem + pytq::tile_at(rows, t, column / 8) + 2 * (column % 8), 2);
    }
}

template <int ID> void check(const char * name) {
    using T = pytq::type<ID>;
    const pytq_type_info * const type = pytq_type_get(ID);
    std::mt19937 rng(11);
    std::normal_distribution<float> normal(0.0f, 1.0f);
    std::vector<float> x(rows * T::d), want(x.size());
    for (size_t i = 0; i < x.size(); i++) {
        const int t = (int) i / T::d;
        x[i] = t == 3 ? 0.0f : normal(rng) * std::exp2((float) (t % 13 - 9));
    }
    std::vector<uint8_t> blocks(rows * T::block_bytes);
    pytq_quantize_ref(type, x.data(), blocks.data(), (int64_t) x.size());
    pytq_dequantize_ref(type, blocks.data(), want.data(), (int64_t) want.size());
    int wrong = 0;
    double worst = 0.0;
    // strides between tokens: several heads side by side, one head (odd where the block is)
    for (const int nb1 : {8 * T::block_bytes, 3 * T::block_bytes, (int) T::block_bytes}) {
        for (const int lead : {0, 1, 6, 15}) {
            std::vector<uint16_t> keys(x.size()), values(x.size());
            for (int warp = 0; warp < rows / warp_tokens; warp++) {
                shim::launch(decode_tile<ID, false>, dim3(1), dim3(32), pytq::decode_smem, sizeof pytq::decode_smem,
                             sizeof pytq::decode_smem, blocks.data(), nb1, lead, warp, keys.data());
                shim::launch(decode_tile<ID, true>, dim3(1), dim3(32), pytq::decode_smem, sizeof pytq::decode_smem,
                             sizeof pytq::decode_smem, blocks.data(), nb1, lead, warp, values.data());
            }
            for (int t = 0; t < rows; t++) {
                const uint8_t * const b = &blocks[t * T::block_bytes];
                const float scale = T::scale_bytes == 1 ? pytq::log8_scale(b[0]) : pytq::half_bits(b[0] | b[1] << 8);
                const float factor = scale * pytq::book<T::code, T::bits>::step();
                float top = 0.0f;
                for (int c = 0; c < T::d; c++) {
                    top = std::max(top, std::fabs(want[t * T::d + c]));
                }
                for (int c = 0; c < T::d; c++) {
                    const size_t i = (size_t) t * T::d + c;
                    wrong += std::fabs(factor * pytq::half_bits(keys[i]) - want[i]) > 1e-5f * top;
                    const double e = std::fabs(pytq::half_bits(values[i]) - want[i]);
                    worst = std::max(worst, top > 0.0f ? e / top : e);
                }
            }
        }
    }
    printf("%s %d %d %g\n", name, T::d, wrong, worst);
}

} // namespace

int main() {
#define PYTQ_TYPE(name, slot, hd, n0, b0, n1, ...)                                                                     \
    if constexpr ((hd == 64 || hd == 128) && n1 == 0) {                                                                \
        check<PYTQ_TYPE_BASE + PYTQ_FAMILY_STRIDE * PYTQ_FAMILY_INDEX_##name + (slot)>(#name);                         \
    }
    const auto all = [](auto) {
#include "types.def"
    };
    all(0);
    return 0;
}

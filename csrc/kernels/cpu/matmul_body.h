// matmul on tile registers. What is computed: kernels/matmul.h.
//
//   for each block of kBlockDepth of k
//     b split and packed, by threads               panels of 32 columns, in the workspace
//     task = a chunk of rows of c                  a split and packed: panels of 32 rows, in L2
//       for each kColumnPanels of b, each kRunSteps of k
//         for each panel of a, each panel of b     32 x 32 sums in four tiles, of six products
//
// Sums start anew at every run and are added to c, which keeps long sums as good as those of a
// library that works by blocks; it happens while the next block is multiplied.
//
// A packed tile is 16 rows of 16 pairs along k, 1 KiB: of a by rows of a, of b by pairs (pair i of
// 16 columns).
#pragma once

#include "kernels/cpu/microkernel.h"
#include "kernels/cpu/split_bf16.h"
#include "kernels/cpu/tasks.h"
#include "kernels/matmul.h"

namespace wgpt::cpu::WGPT_TARGET {

#if defined(__AMX_BF16__)

constexpr int kTile = 16, kTileDepth = 32;  // rows or columns, and elements of k, of a tile
constexpr int kPanel = 2 * kTile;           // rows or columns of a panel
constexpr int kTileFloats = kTile * kTile;  // 1 KiB
constexpr int64_t kStepFloats = int64_t{2} * kSplits * kTileFloats;  // of a panel, 32 of k
constexpr int64_t kBlockDepth = 256;
// Of k, in steps, that one sum in tile registers runs over. Measured on one Sapphire Rapids core: 450
// GFLOP/s with 4, 375 with 8, whose two panels of 48 KiB no longer share L1; vector multiply-adds
// reach 180 in MKL.
constexpr int64_t kRunSteps = 4;
// What a task keeps in L2. Measured, two threads, GFLOP/s at 6000 x 640 x 2560 and 256 x 6000 x 1024: 460
// and 350; with 4 panels of rows and blocks of 512 400 and 300.
constexpr int64_t kRowPanels = 8, kColumnPanels = 16;

// Where element (i, k) of an operand lies: i counts rows of a, columns of b.
struct Operand {
  const float* data;
  int64_t outer, depth;  // strides
  int64_t n_outer, n_depth;
};

// Panels or steps [begin, end).
struct Span {
  int64_t begin, end;
};

// Lanes [0, n) of 16.
inline __mmask16 first_lanes(int64_t n) {
  return n >= 16 ? __mmask16{0xffff} : static_cast<__mmask16>((1u << max_of<int64_t>(n, 0)) - 1);
}

// One tile of each split from element (i, k) on: rows of pairs if kByOuter, else pairs of columns.
// kDense: whether it is along k that elements lie side by side, else from row to row or column to
// column. out: the splits, two tiles apart.
template <bool kByOuter, bool kDense>
WGPT_INLINE void pack_tile(const Operand& x, int64_t i, int64_t k, float* out) {
  alignas(64) static constexpr uint16_t kPairs[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                      21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                      11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  constexpr bool kNatural = kByOuter == kDense;  // whether rows come as they are stored
  constexpr int64_t kSplitFloats = kNatural ? 2 * kTileFloats : kTileFloats;
  const float* from = x.data + i * x.outer + k * x.depth;
  const int64_t n_outer = x.n_outer - i, n_depth = x.n_depth - k;
  alignas(64) float across[kNatural ? 1 : kSplits * kTileFloats];
  float* rows = kNatural ? out : across;
  const __m512i pairs = _mm512_load_si512(kPairs);
  const __mmask16 first = first_lanes(kDense ? n_depth : n_outer),
                  second = kDense ? first_lanes(n_depth - kTile) : first;
  for (int r = 0; r < kTile; ++r) {  // of row r, or of rows 2 r and 2 r + 1 along k
    Floats a = splat(0.0f), b = a;
    if (kDense ? r < n_outer : 2 * r < n_depth) a = _mm512_maskz_loadu_ps(first, from);
    if constexpr (kDense) {
      if (r < n_outer) b = _mm512_maskz_loadu_ps(second, from + kTile);
      from += x.outer;
    } else {
      if (2 * r + 1 < n_depth) b = _mm512_maskz_loadu_ps(second, from + x.depth);
      from += 2 * x.depth;
    }
    __m512i parts[kSplits];
    split_values(a, b, parts);
    WGPT_UNROLL for (int s = 0; s < kSplits; ++s) {
      const __m512i units = kDense ? parts[s] : _mm512_permutexvar_epi16(pairs, parts[s]);
      _mm512_store_si512(rows + s * kSplitFloats + r * kTile, units);
    }
  }
  if constexpr (!kNatural) {
    for (int s = 0; s < kSplits; ++s) {
      transpose_block(across + s * kTileFloats, kTile, out + s * 2 * kTileFloats, kTile);
    }
  }
}

// Packs steps and panels, of the n_steps steps from k on and the panels from i on that `out` holds, in
// the order in which they lie in memory.
template <bool kByOuter>
void pack_panels(const Operand& x, int64_t i, int64_t k, int64_t n_steps, Span panels, Span steps,
                 float* out) {
  const auto pack = [&](auto dense, int64_t tile, int64_t step) {
    pack_tile<kByOuter, dense.value>(
        x, i + tile * kTile, k + step * kTileDepth,
        out + (tile / 2 * n_steps + step) * kStepFloats + tile % 2 * kTileFloats);
  };
  if (x.depth == 1) {
    for (int64_t tile = 2 * panels.begin; tile < 2 * panels.end; ++tile) {
      for (int64_t step = steps.begin; step < steps.end; ++step) pack(Constant<1>{}, tile, step);
    }
  } else {
    for (int64_t step = steps.begin; step < steps.end; ++step) {
      for (int64_t tile = 2 * panels.begin; tile < 2 * panels.end; ++tile) {
        pack(Constant<0>{}, tile, step);
      }
    }
  }
}

// A 32 x 32 block of sums on its way into c, which may have fewer rows and columns there.
struct Sums {
  const float* from;
  float* c;
  int64_t c_row, n_rows, n_columns;
  bool from_zero;  // c = sums instead of c += sums
};

// Rows [begin, end) of a block. Gives what is NaN if some element is not finite, else 0.
WGPT_INLINE Floats add_sums(const Sums& sums, int64_t begin, int64_t end) {
  const __mmask16 first = first_lanes(sums.n_columns), second = first_lanes(sums.n_columns - kTile);
  Floats check = splat(0.0f);
  for (int64_t r = begin; r < min_of(end, sums.n_rows); ++r) {
    float* row = sums.c + r * sums.c_row;
    Floats x = load(sums.from + r * kPanel), y = load(sums.from + r * kPanel + kTile);
    if (!sums.from_zero) {
      x = x + _mm512_maskz_loadu_ps(first, row);
      y = y + _mm512_maskz_loadu_ps(second, row + kTile);
    }
    check = fma(x + y, splat(0.0f), check);
    _mm512_mask_storeu_ps(row, first, x);
    _mm512_mask_storeu_ps(row + kTile, second, y);
  }
  return check;
}

// out (32 x 32) = the product of a panel of a and one of b over n_steps. Meanwhile the block made
// before is added, in the shadow of the products: by itself that takes a fifth of the time.
inline Floats multiply_panels(const float* a, const float* b, int64_t n_steps, float* out,
                              const Sums& before) {
  constexpr int64_t kRowBytes = kPanel * 4;
  const int64_t n_rows = ceil_div(int64_t{kPanel}, n_steps);
  float* lower = out + kTile * kPanel;
  Floats check = splat(0.0f);
  asm volatile("" ::: "memory");  // GCC's tile loads do not say that they read memory
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
#define WGPT_LOAD_A(split)                           \
  _tile_loadd(4, a + (split) * 2 * kTileFloats, 64); \
  _tile_loadd(5, a + ((split) * 2 + 1) * kTileFloats, 64)
#define WGPT_LOAD_B(split)                           \
  _tile_loadd(6, b + (split) * 2 * kTileFloats, 64); \
  _tile_loadd(7, b + ((split) * 2 + 1) * kTileFloats, 64)
#define WGPT_PRODUCTS      \
  _tile_dpbf16ps(0, 4, 6); \
  _tile_dpbf16ps(1, 4, 7); \
  _tile_dpbf16ps(2, 5, 6); \
  _tile_dpbf16ps(3, 5, 7)
  for (int64_t step = 0; step < n_steps; ++step) {
    WGPT_LOAD_B(0);
    WGPT_LOAD_A(2);
    WGPT_PRODUCTS;
    check = check + add_sums(before, step * n_rows, (step + 1) * n_rows);
    WGPT_LOAD_A(1);
    WGPT_PRODUCTS;
    WGPT_LOAD_A(0);
    WGPT_PRODUCTS;
    WGPT_LOAD_B(2);
    WGPT_PRODUCTS;
    WGPT_LOAD_B(1);
    WGPT_PRODUCTS;
    WGPT_LOAD_A(1);
    WGPT_PRODUCTS;
    a += kStepFloats;
    b += kStepFloats;
  }
#undef WGPT_PRODUCTS
#undef WGPT_LOAD_B
#undef WGPT_LOAD_A
  _tile_stored(0, out, kRowBytes);
  _tile_stored(1, out + kTile, kRowBytes);
  _tile_stored(2, lower, kRowBytes);
  _tile_stored(3, lower + kTile, kRowBytes);
  asm volatile("" ::: "memory");
  return check;
}

inline size_t matmul_workspace_bytes(int64_t n, int64_t k) {
  const int64_t n_steps = ceil_div(min_of(k, kBlockDepth), kTileDepth);
  return static_cast<size_t>(ceil_div(n, kPanel) * n_steps * kStepFloats) * sizeof(float);
}

inline bool matmul(const Matmul& args, const Executor& executor) {
  const Operand a{args.a, args.a_row, args.a_column, args.m, args.k};
  const Operand b{args.b, args.b_column, args.b_row, args.n, args.k};
  auto* b_packed = static_cast<float*>(args.workspace);
  const int64_t n_panels = ceil_div(args.n, kPanel), m_panels = ceil_div(args.m, kPanel);
  // A task is a chunk of at most kRowPanels and all columns; chunks are as even as threads, and with
  // fewer of them than threads a task has some of the columns.
  const int64_t n_threads = max_of(1, executor.n_threads);
  const int64_t n_rounds = ceil_div(m_panels, kRowPanels * n_threads);
  const int64_t chunk = m_panels < kRowPanels * n_threads
                            ? min_of(kRowPanels, m_panels)
                            : ceil_div(m_panels, n_rounds * n_threads);
  const int64_t n_chunks = ceil_div(m_panels, chunk);
  const int64_t n_groups = min_of(n_panels, ceil_div(n_threads, n_chunks));
  const int64_t group = ceil_div(n_panels, n_groups);
  bool all_finite = true;
  for (int64_t block = 0; block < args.k; block += kBlockDepth) {
    const int64_t n_steps = ceil_div(min_of(kBlockDepth, args.k - block), kTileDepth);
    if (b.depth == 1) {
      run_tasks(executor, n_panels, [&](int64_t panel) {
        pack_panels<false>(b, 0, block, n_steps, {panel, panel + 1}, {0, n_steps}, b_packed);
      });
    } else {
      run_tasks(executor, n_steps, [&](int64_t step) {
        pack_panels<false>(b, 0, block, n_steps, {0, n_panels}, {step, step + 1}, b_packed);
      });
    }
    run_tasks(executor, n_chunks * n_groups, [&](int64_t task) {
      const typename MatrixDot::Scope scope;
      const int64_t first = task / n_groups * chunk, begin = task % n_groups * group;
      const int64_t n_own = min_of(chunk, m_panels - first);
      const int64_t end = min_of(begin + group, n_panels);
      auto* a_packed = static_cast<float*>(
          thread_scratch(static_cast<size_t>(n_own * n_steps * kStepFloats) * sizeof(float)));
      pack_panels<true>(a, first * kPanel, block, n_steps, {0, n_own}, {0, n_steps}, a_packed);
      alignas(64) float both[2][kPanel * kPanel];  // in turn: one is added while the other is made
      Sums made{};
      int64_t n_made = 0;
      Floats check = splat(0.0f);
      for (int64_t j_begin = begin; j_begin < end; j_begin += kColumnPanels) {
        const int64_t j_end = min_of(j_begin + kColumnPanels, end);
        for (int64_t step = 0; step < n_steps; step += kRunSteps) {
          const int64_t n_run = min_of(kRunSteps, n_steps - step);
          for (int64_t i = 0; i < n_own; ++i) {
            const int64_t row = (first + i) * kPanel;
            for (int64_t j = j_begin; j < j_end; ++j) {
              float* out = both[n_made++ % 2];
              check = check + multiply_panels(a_packed + (i * n_steps + step) * kStepFloats,
                                              b_packed + (j * n_steps + step) * kStepFloats, n_run,
                                              out, made);
              made = {out,
                      args.c + row * args.c_row + j * kPanel,
                      args.c_row,
                      min_of<int64_t>(kPanel, args.m - row),
                      args.n - j * kPanel,
                      block + step == 0 && !args.accumulate};
            }
          }
        }
      }
      check = check + add_sums(made, 0, kPanel);
      if (reduce_add(check) != 0.0f) __atomic_store_n(&all_finite, false, __ATOMIC_RELAXED);
    });
  }
  return all_finite;
}

#endif

}  // namespace wgpt::cpu::WGPT_TARGET

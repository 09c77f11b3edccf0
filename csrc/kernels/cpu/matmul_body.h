// matmul on tile registers. What is computed: kernels/matmul.h.
//
//   for each block of kBlockDepth of k (or once for all of k, where b is kept for several products)
//     the shared operand split and packed, by threads           in the workspace
//     task = a chunk of the other one, its own                  split and packed in L2
//       for each kSharedPanels of the shared one, each kRunSteps of k
//         for each own panel, each shared panel   32 x 32 sums in four tiles, of six products
//
// Shared is the smaller operand: what one thread has packed and another reads crosses between their
// caches.
//
// Sums start anew at every run and are added to c, which keeps long sums as good as those of a
// library that works by blocks; it happens while the next block is multiplied.
//
// A panel is 32 rows of a or columns of b. A packed tile is 16 of them by 16 pairs along k, 1 KiB: of
// a by rows, of b by pairs.
#pragma once

#include "kernels/cpu/tasks.h"
#include "kernels/cpu/tiles.h"
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
// What a task keeps in L2. Measured in place (feed_forward of gpt-s and gpt-l, both threads): 4 to 12
// own panels, 8 to 32 shared ones, blocks of 192 to 768 and runs of 3 and 4 differ by less than the
// noise (5 %).
constexpr int64_t kOwnPanels = 8, kSharedPanels = 16;

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
  const float* from = x.data + i * x.outer + k * x.depth;
  int64_t stride = kDense ? x.outer : x.depth;
  alignas(64) float padded[kTile * kTileDepth], across[kTile * kTileDepth];
  const int64_t n_outer = min_of<int64_t>(kTile, x.n_outer - i),
                n_depth = min_of<int64_t>(kTileDepth, x.n_depth - k);
  if (n_outer < kTile || n_depth < kTileDepth) {
    constexpr int kWidth = kDense ? kTileDepth : kTile;
    const int64_t width = max_of<int64_t>(0, kDense ? n_depth : n_outer);
    clear_floats(padded, kTile * kTileDepth);
    for (int64_t r = 0; r < (kDense ? n_outer : n_depth); ++r)
      std::memcpy(padded + r * kWidth, from + r * stride,
                  static_cast<size_t>(width) * sizeof(float));
    from = padded;
    stride = kWidth;
  }
  if constexpr (kByOuter != kDense) {  // else rows are wanted as they lie
    constexpr int64_t kAcross = kDense ? kTile : kTileDepth;
    for (int half = 0; half < 2; ++half) {
      transpose_block(from + half * (kDense ? kTile : kTile * stride), stride,
                      across + half * (kDense ? kTile * kAcross : kTile), kAcross);
    }
    from = across;
    stride = kAcross;
  }
  // A row of a, or two along k of b.
  const int64_t second = kByOuter ? kTile : stride, next = kByOuter ? stride : 2 * stride;
  const __m512i pairs = _mm512_load_si512(kPairOrder);
  for (int r = 0; r < kTile; ++r, from += next) {
    __m512i parts[kSplits];
    split_values(load(from), load(from + second), parts);
    WGPT_UNROLL for (int s = 0; s < kSplits; ++s) {
      const __m512i units = kByOuter ? parts[s] : _mm512_permutexvar_epi16(pairs, parts[s]);
      _mm512_store_si512(out + s * 2 * kTileFloats + r * kTile, units);
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

inline int64_t n_panels_of(int64_t n) { return ceil_div(n, kPanel); }

// Where a block of k from `block` on begins among the packed panels of all of k.
inline int64_t packed_block(int64_t n_panels, int64_t block) {
  return n_panels * (block / kTileDepth) * kStepFloats;
}

inline size_t matmul_workspace_bytes(const Matmul& args) {
  const bool keeps_b = args.b_packing != Packing::kByBlocks;
  const int64_t n_panels = n_panels_of(keeps_b ? args.n : min_of(args.m, args.n));
  const int64_t depth = keeps_b ? args.k : min_of(args.k, kBlockDepth);
  return static_cast<size_t>(n_panels * ceil_div(depth, kTileDepth) * kStepFloats) * sizeof(float);
}

// kOwnRows: tasks own rows of a and share b, else they own columns of b and share a.
template <bool kOwnRows>
class MatmulBy {
 public:
  MatmulBy(const Matmul& args, const Executor& executor)
      : args_(args),
        executor_(executor),
        own_(kOwnRows ? rows_of_a() : columns_of_b()),
        shared_(kOwnRows ? columns_of_b() : rows_of_a()),
        n_own_(n_panels_of(own_.n_outer)),
        n_shared_(n_panels_of(shared_.n_outer)),
        shared_packed_(static_cast<float*>(args.workspace)) {
    // Chunks are as even as threads; with fewer of them than threads a task has some of the shared
    // panels.
    const int64_t n_threads = max_of(1, executor.n_threads);
    const int64_t n_rounds = ceil_div(n_own_, kOwnPanels * n_threads);
    chunk_ = n_own_ < n_threads ? 1 : ceil_div(n_own_, n_rounds * n_threads);
    const int64_t n_chunks = ceil_div(n_own_, chunk_);
    n_groups_ = min_of(n_shared_, ceil_div(n_threads, n_chunks));
    group_ = ceil_div(n_shared_, n_groups_);
    n_tasks_ = n_chunks * n_groups_;
  }

  // Gives whether all of c is finite.
  bool run() {
    const int64_t depth = args_.b_packing == Packing::kByBlocks ? kBlockDepth : args_.k;
    for (int64_t begin = 0; begin < args_.k; begin += depth) {
      const int64_t end = min_of(begin + depth, args_.k);
      if (args_.b_packing != Packing::kKept) pack_shared(begin, end);
      run_tasks(executor_, n_tasks_, [&](int64_t task) { multiply(task, begin, end); });
    }
    return all_finite_;
  }

 private:
  Operand rows_of_a() const { return {args_.a, args_.a_row, args_.a_column, args_.m, args_.k}; }
  Operand columns_of_b() const { return {args_.b, args_.b_column, args_.b_row, args_.n, args_.k}; }

  static int64_t steps_of(int64_t begin, int64_t end) {
    return ceil_div(min_of(end - begin, kBlockDepth), kTileDepth);
  }

  // The shared operand over [begin, end) of k.
  void pack_shared(int64_t begin, int64_t end) {
    const auto pack = [&](int64_t block, Span panels, Span steps) {
      pack_panels<!kOwnRows>(shared_, 0, block, steps_of(block, end), panels, steps,
                             shared_packed_ + packed_block(n_shared_, block - begin));
    };
    if (shared_.depth == 1) {
      run_tasks(executor_, n_shared_, [&](int64_t panel) {
        for (int64_t block = begin; block < end; block += kBlockDepth)
          pack(block, {panel, panel + 1}, {0, steps_of(block, end)});
      });
    } else {
      run_tasks(executor_, ceil_div(end - begin, kTileDepth), [&](int64_t step) {
        const int64_t k = step * kTileDepth / kBlockDepth * kBlockDepth;
        const int64_t own = step - k / kTileDepth;
        pack(begin + k, {0, n_shared_}, {own, own + 1});
      });
    }
  }

  void multiply(int64_t task, int64_t k_begin, int64_t k_end) {
    const typename MatrixDot::Scope scope;
    const int64_t first = task / n_groups_ * chunk_, begin = task % n_groups_ * group_;
    const int64_t n_own = min_of(chunk_, n_own_ - first), end = min_of(begin + group_, n_shared_);
    auto* own_packed = static_cast<float*>(thread_scratch(
        static_cast<size_t>(n_own * steps_of(k_begin, k_end) * kStepFloats) * sizeof(float)));
    alignas(64) float sums[kPanel * kPanel];  // added before the next are stored
    Sums made{};
    Floats check = splat(0.0f);
    for (int64_t block = k_begin; block < k_end; block += kBlockDepth) {
      const int64_t n_steps = steps_of(block, k_end);
      const float* shared = shared_packed_ + packed_block(n_shared_, block - k_begin);
      pack_panels<kOwnRows>(own_, first * kPanel, block, n_steps, {0, n_own}, {0, n_steps},
                            own_packed);
      for (int64_t j_begin = begin; j_begin < end; j_begin += kSharedPanels) {
        const int64_t j_end = min_of(j_begin + kSharedPanels, end);
        for (int64_t step = 0; step < n_steps; step += kRunSteps) {
          const int64_t n_run = min_of(kRunSteps, n_steps - step);
          for (int64_t i = 0; i < n_own; ++i) {
            const float* mine = own_packed + (i * n_steps + step) * kStepFloats;
            for (int64_t j = j_begin; j < j_end; ++j) {
              const float* other = shared + (j * n_steps + step) * kStepFloats;
              check = check + multiply_panels(kOwnRows ? mine : other, kOwnRows ? other : mine,
                                              n_run, sums, made);
              made = sums_of(sums, kOwnRows ? first + i : j, kOwnRows ? j : first + i,
                             block + step == 0 && !args_.accumulate);
            }
          }
        }
      }
    }
    check = check + add_sums(made, 0, kPanel);
    if (reduce_add(check) != 0.0f) __atomic_store_n(&all_finite_, false, __ATOMIC_RELAXED);
  }

  Sums sums_of(const float* from, int64_t row_panel, int64_t column_panel, bool from_zero) const {
    const int64_t row = row_panel * kPanel, column = column_panel * kPanel;
    return {from,
            args_.c + row * args_.c_row + column,
            args_.c_row,
            min_of<int64_t>(kPanel, args_.m - row),
            args_.n - column,
            from_zero};
  }

  const Matmul& args_;
  const Executor& executor_;
  const Operand own_, shared_;
  const int64_t n_own_, n_shared_;
  float* const shared_packed_;
  int64_t chunk_, group_, n_groups_, n_tasks_;
  bool all_finite_ = true;
};

inline bool matmul(const Matmul& args, const Executor& executor) {
  if (args.b_packing == Packing::kByBlocks && args.m < args.n)
    return MatmulBy<false>(args, executor).run();
  return MatmulBy<true>(args, executor).run();
}

#endif

}  // namespace wgpt::cpu::WGPT_TARGET

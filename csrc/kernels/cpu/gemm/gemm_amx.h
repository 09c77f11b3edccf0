// matmul on tile registers. What is computed: kernels/matmul.h; the way through a product: gemm.h.
//
//   for each kRunSteps of k, each own panel, each shared panel   32 x 32 sums in four tiles, of six products
//
// Sums start anew at every run and are added to c, which keeps long sums as good as those of a
// library that works by blocks; it happens while the next block is multiplied.
//
// A panel is 32 rows of a or columns of b. A packed tile is 16 of them by 16 pairs along k, 1 KiB: of
// a by rows, of b by pairs.
#pragma once

#include "kernels/cpu/gemm/amx.h"
#include "kernels/cpu/gemm/operand.h"

namespace wgpt::cpu::WGPT_TARGET {

#if defined(__AMX_BF16__)

constexpr int kTile = 16, kTileDepth = 32;  // rows or columns, and elements of k, of a tile
constexpr int kPanel = 2 * kTile;           // rows or columns of a panel
constexpr int kTileFloats = kTile * kTile;  // 1 KiB
constexpr int64_t kStepFloats = int64_t{2} * kBf16x3Terms * kTileFloats;  // of a panel, 32 of k
// Of k, in steps, that one sum in tile registers runs over. Measured on one Sapphire Rapids core: 450
// GFLOP/s with 4, 375 with 8, whose two panels of 48 KiB no longer share L1; vector multiply-adds
// reach 180 in MKL.
constexpr int64_t kRunSteps = 4;
// Lanes [0, n) of 16.
inline __mmask16 first_lanes(int64_t n) {
  return n >= 16 ? __mmask16{0xffff} : static_cast<__mmask16>((1u << max_of<int64_t>(n, 0)) - 1);
}

// One tile of each split from element (i, k) on: rows of pairs if kByOuter, else pairs of columns.
// kDense: whether it is along k that elements lie side by side, else from row to row or column to
// column. out: the splits, two tiles apart.
template <bool kByOuter, bool kDense>
WGPT_INLINE void pack_tile(const Operand<float>& x, int64_t i, int64_t k, float* out) {
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
    __m512i terms[kBf16x3Terms];
    split_bf16x3(load(from), load(from + second), terms);
    WGPT_UNROLL for (int s = 0; s < kBf16x3Terms; ++s) {
      const __m512i units = kByOuter ? terms[s] : _mm512_permutexvar_epi16(pairs, terms[s]);
      _mm512_store_si512(out + s * 2 * kTileFloats + r * kTile, units);
    }
  }
}

// Packs steps and panels, of the n_steps steps from k on and the panels from i on that `out` holds, in
// the order in which they lie in memory.
template <bool kByOuter>
void pack_panels(const Operand<float>& x, int64_t i, int64_t k, int64_t n_steps, Span panels,
                 Span steps, float* out) {
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
#define WGPT_DPBF16        \
  _tile_dpbf16ps(0, 4, 6); \
  _tile_dpbf16ps(1, 4, 7); \
  _tile_dpbf16ps(2, 5, 6); \
  _tile_dpbf16ps(3, 5, 7)
  for (int64_t step = 0; step < n_steps; ++step) {
    WGPT_LOAD_B(0);
    WGPT_LOAD_A(2);
    WGPT_DPBF16;
    check = check + add_sums(before, step * n_rows, (step + 1) * n_rows);
    WGPT_LOAD_A(1);
    WGPT_DPBF16;
    WGPT_LOAD_A(0);
    WGPT_DPBF16;
    WGPT_LOAD_B(2);
    WGPT_DPBF16;
    WGPT_LOAD_B(1);
    WGPT_DPBF16;
    WGPT_LOAD_A(1);
    WGPT_DPBF16;
    a += kStepFloats;
    b += kStepFloats;
  }
#undef WGPT_DPBF16
#undef WGPT_LOAD_B
#undef WGPT_LOAD_A
  _tile_stored(0, out, kRowBytes);
  _tile_stored(1, out + kTile, kRowBytes);
  _tile_stored(2, lower, kRowBytes);
  _tile_stored(3, lower + kTile, kRowBytes);
  asm volatile("" ::: "memory");
  return check;
}

class TileProduct {
 public:
  using Element = float;
  template <bool kIsRows>
  static constexpr int64_t kPanel = WGPT_TARGET::kPanel;
  template <bool kIsRows>
  static constexpr int64_t kFloatsPerDepth = kStepFloats / kTileDepth;
  static constexpr int64_t kStepDepth = kTileDepth, kBlockDepth = 256, kDepthAtOnce = kBlockDepth;
  static constexpr bool kReadsInPlace = false;
  // What a task keeps in L2. Measured in place (feed_forward of gpt-s and gpt-l, both threads): 4 to 12
  // own panels, 8 to 32 shared ones, blocks of 192 to 768 and runs of 3 and 4 differ by less than the
  // noise (5 %).
  template <bool kIsRows>
  static constexpr int64_t kOwnPanels = 8;
  template <bool kIsRows>
  static constexpr int64_t kSharedPanels = 16;

  TileProduct(const Matmul& args, Span, Span, float*) : args_(args) {}

  static int64_t sums_floats(const Matmul&, Span, Span) { return 0; }

  template <bool kIsRows>
  static void pack(const Operand<float>& x, int64_t i, int64_t k, int64_t n_steps, Span panels,
                   Span steps, float* out) {
    pack_panels<kIsRows>(x, i, k, n_steps, panels, steps, out);
  }

  template <bool kOwnRows>
  void multiply(const Panels& rows, const Panels& columns, const Block& block) {
    const Panels &own = kOwnRows ? rows : columns, &shared = kOwnRows ? columns : rows;
    for (int64_t step = 0; step < block.n_steps; step += kRunSteps) {
      const int64_t n_run = min_of(kRunSteps, block.n_steps - step);
      for (int64_t i = 0; i < own.span.size(); ++i) {
        for (int64_t j = 0; j < shared.span.size(); ++j) {
          const int64_t row = kOwnRows ? i : j, column = kOwnRows ? j : i;
          check_ =
              check_ + multiply_panels(rows[row] + step * kStepFloats,
                                       columns[column] + step * kStepFloats, n_run, sums_, made_);
          made_ = sums_of(rows.span.begin + row, columns.span.begin + column,
                          block.is_first && step == 0 && !args_.accumulate);
        }
      }
    }
  }

  // Gives false if some element of c is not finite.
  bool finish() {
    check_ = check_ + add_sums(made_, 0, WGPT_TARGET::kPanel);
    return reduce_add(check_) == 0.0f;
  }

 private:
  Sums sums_of(int64_t row_panel, int64_t column_panel, bool from_zero) const {
    constexpr int64_t kSide = WGPT_TARGET::kPanel;
    const int64_t row = row_panel * kSide, column = column_panel * kSide;
    return {sums_,
            static_cast<float*>(args_.c) + row * args_.c_row + column,
            args_.c_row,
            min_of(kSide, args_.m - row),
            args_.n - column,
            from_zero};
  }

  const Amx16x64Dot::Scope scope_;
  const Matmul& args_;
  alignas(64) float sums_[WGPT_TARGET::kPanel *
                          WGPT_TARGET::kPanel];  // added before the next are stored
  Sums made_{};
  Floats check_ = splat(0.0f);
};

#endif

}  // namespace wgpt::cpu::WGPT_TARGET

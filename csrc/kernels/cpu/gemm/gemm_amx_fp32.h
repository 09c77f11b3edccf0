// float32 GEMM on AMX, emulated by six bfloat16 GEMMs (bf16x3). The formula: kernels/gemm.h; the loops: gemm.h.
//
//   for each kRunSteps of k, each private panel, each shared panel   a 32 x 32 block in four AMX tiles
//
// Accumulators start from zero at every run of kRunSteps and are then added to c, which keeps long sums as
// accurate as those of a library that works by blocks. Adding a block to c overlaps with the AMX work of the
// next one.
//
// A panel is 32 rows of a or columns of b. A packed AMX tile is 16 of them by 16 pairs along k, 1 KiB: of
// a by rows, of b by pairs.
#pragma once

#include "kernels/cpu/gemm/amx.h"
#include "kernels/cpu/gemm/operand.h"

namespace wgpt::cpu::WGPT_TARGET {

#if defined(__AMX_BF16__)

constexpr int kAmxRows = 16, kAmxDepth = 32;  // rows or columns, and elements of k, of a tile
constexpr int kPanel = 2 * kAmxRows;          // rows or columns of a panel
constexpr int kAmxTileFloats = kAmxRows * kAmxRows;                          // 1 KiB
constexpr int64_t kStepFloats = int64_t{2} * kBf16x3Terms * kAmxTileFloats;  // of a panel, 32 of k
// Steps of k that accumulate in the tile registers before c is updated. Measured on one Sapphire Rapids core: 450
// GFLOP/s with 4, 375 with 8, whose two panels of 48 KiB no longer share L1; vector FMAs
// reach 180 in MKL.
constexpr int64_t kRunSteps = 4;
// Lanes [0, n) of 16.
inline __mmask16 first_lanes(int64_t n) {
  return n >= 16 ? __mmask16{0xffff} : static_cast<__mmask16>((1u << max_of<int64_t>(n, 0)) - 1);
}

// One AMX tile of each term, from element (i, k) on: rows of pairs if kByOuter, else pairs of columns.
// kDense: elements are contiguous along k, else along rows of a or columns of b. out: the terms, two tiles
// apart.
template <bool kByOuter, bool kDense>
WGPT_INLINE void pack_amx_tile(const Operand<float>& x, int64_t i, int64_t k, float* out) {
  const float* from = x.data + i * x.outer + k * x.depth;
  int64_t stride = kDense ? x.outer : x.depth;
  alignas(64) float padded[kAmxRows * kAmxDepth], across[kAmxRows * kAmxDepth];
  const int64_t n_outer = min_of<int64_t>(kAmxRows, x.n_outer - i),
                n_depth = min_of<int64_t>(kAmxDepth, x.n_depth - k);
  if (n_outer < kAmxRows || n_depth < kAmxDepth) {
    constexpr int kWidth = kDense ? kAmxDepth : kAmxRows;
    const int64_t width = max_of<int64_t>(0, kDense ? n_depth : n_outer);
    clear_floats(padded, kAmxRows * kAmxDepth);
    for (int64_t r = 0; r < (kDense ? n_outer : n_depth); ++r)
      std::memcpy(padded + r * kWidth, from + r * stride,
                  static_cast<size_t>(width) * sizeof(float));
    from = padded;
    stride = kWidth;
  }
  if constexpr (kByOuter != kDense) {  // else no transpose is needed
    constexpr int64_t kAcross = kDense ? kAmxRows : kAmxDepth;
    for (int half = 0; half < 2; ++half) {
      transpose_block(from + half * (kDense ? kAmxRows : kAmxRows * stride), stride,
                      across + half * (kDense ? kAmxRows * kAcross : kAmxRows), kAcross);
    }
    from = across;
    stride = kAcross;
  }
  // One row of a, or two rows along k of b.
  const int64_t second = kByOuter ? kAmxRows : stride, next = kByOuter ? stride : 2 * stride;
  const __m512i pairs = _mm512_load_si512(kPairOrder);
  for (int r = 0; r < kAmxRows; ++r, from += next) {
    __m512i terms[kBf16x3Terms];
    split_bf16x3(load(from), load(from + second), terms);
    WGPT_UNROLL for (int s = 0; s < kBf16x3Terms; ++s) {
      const __m512i units = kByOuter ? terms[s] : _mm512_permutexvar_epi16(pairs, terms[s]);
      _mm512_store_si512(out + s * 2 * kAmxTileFloats + r * kAmxRows, units);
    }
  }
}

// Packs some steps and panels of those that `out` holds (n_steps steps from k on, panels from i on), in the
// order of their memory.
template <bool kByOuter>
void pack_panels(const Operand<float>& x, int64_t i, int64_t k, int64_t n_steps, Span panels,
                 Span steps, float* out) {
  const auto pack = [&](auto dense, int64_t tile, int64_t step) {
    pack_amx_tile<kByOuter, dense.value>(
        x, i + tile * kAmxRows, k + step * kAmxDepth,
        out + (tile / 2 * n_steps + step) * kStepFloats + tile % 2 * kAmxTileFloats);
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

// A 32 x 32 block of accumulators to be added to c, which may have fewer rows and columns there.
struct PendingBlock {
  const float* from;
  float* c;
  int64_t c_row, n_rows, n_columns;
  bool from_zero;  // c = block instead of c += block
};

// Adds rows [begin, end) of a block. Returns NaN in some lane if some element is not finite, else 0.
WGPT_INLINE Floats add_to_c(const PendingBlock& pending, int64_t begin, int64_t end) {
  const __mmask16 first = first_lanes(pending.n_columns),
                  second = first_lanes(pending.n_columns - kAmxRows);
  Floats check = splat(0.0f);
  for (int64_t r = begin; r < min_of(end, pending.n_rows); ++r) {
    float* row = pending.c + r * pending.c_row;
    Floats x = load(pending.from + r * kPanel), y = load(pending.from + r * kPanel + kAmxRows);
    if (!pending.from_zero) {
      x = x + _mm512_maskz_loadu_ps(first, row);
      y = y + _mm512_maskz_loadu_ps(second, row + kAmxRows);
    }
    check = fma(x + y, splat(0.0f), check);
    _mm512_mask_storeu_ps(row, first, x);
    _mm512_mask_storeu_ps(row + kAmxRows, second, y);
  }
  return check;
}

// out (32 x 32) = a panel of a times a panel of b over n_steps. Adding the block before to c overlaps with
// it: by itself that takes a fifth of the time.
inline Floats gemm_panels(const float* a, const float* b, int64_t n_steps, float* out,
                          const PendingBlock& pending) {
  constexpr int64_t kRowBytes = kPanel * 4;
  const int64_t n_rows = ceil_div(int64_t{kPanel}, n_steps);
  float* lower = out + kAmxRows * kPanel;
  Floats check = splat(0.0f);
  asm volatile("" ::: "memory");  // GCC's tile loads do not say that they read memory
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
#define WGPT_LOAD_A(term)                              \
  _tile_loadd(4, a + (term) * 2 * kAmxTileFloats, 64); \
  _tile_loadd(5, a + ((term) * 2 + 1) * kAmxTileFloats, 64)
#define WGPT_LOAD_B(term)                              \
  _tile_loadd(6, b + (term) * 2 * kAmxTileFloats, 64); \
  _tile_loadd(7, b + ((term) * 2 + 1) * kAmxTileFloats, 64)
#define WGPT_DPBF16        \
  _tile_dpbf16ps(0, 4, 6); \
  _tile_dpbf16ps(1, 4, 7); \
  _tile_dpbf16ps(2, 5, 6); \
  _tile_dpbf16ps(3, 5, 7)
  for (int64_t step = 0; step < n_steps; ++step) {
    WGPT_LOAD_B(0);
    WGPT_LOAD_A(2);
    WGPT_DPBF16;
    check = check + add_to_c(pending, step * n_rows, (step + 1) * n_rows);
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
  _tile_stored(1, out + kAmxRows, kRowBytes);
  _tile_stored(2, lower, kRowBytes);
  _tile_stored(3, lower + kAmxRows, kRowBytes);
  asm volatile("" ::: "memory");
  return check;
}

class AmxFp32Gemm {
 public:
  using Element = float;
  template <bool kIsRows>
  static constexpr int64_t kPanel = WGPT_TARGET::kPanel;
  template <bool kIsRows>
  static constexpr int64_t kFloatsPerDepth = kStepFloats / kAmxDepth;
  static constexpr int64_t kStepDepth = kAmxDepth, kKBlockDepth = 256, kKSliceDepth = kKBlockDepth;
  static constexpr bool kReadsInPlace = false;
  // Panels that a task keeps in L2. Measured in place (feed_forward of gpt-s and gpt-l, both threads): 4 to 12
  // private panels, 8 to 32 shared ones, blocks of 192 to 768 and runs of 3 and 4 differ by less than the
  // noise (5 %).
  template <bool kIsRows>
  static constexpr int64_t kPrivatePanels = 8;
  template <bool kIsRows>
  static constexpr int64_t kSharedPanels = 16;

  AmxFp32Gemm(const Gemm& args, Span, Span, float*) : args_(args) {}

  static int64_t accumulator_floats(const Gemm&, Span, Span) { return 0; }

  template <bool kIsRows>
  static void pack(const Operand<float>& x, int64_t i, int64_t k, int64_t n_steps, Span panels,
                   Span steps, float* out) {
    pack_panels<kIsRows>(x, i, k, n_steps, panels, steps, out);
  }

  template <bool kPrivateRows>
  void accumulate(const Panels& rows, const Panels& columns, const KBlock& k_block) {
    const Panels &private_panels = kPrivateRows ? rows : columns,
                 &shared_panels = kPrivateRows ? columns : rows;
    for (int64_t step = 0; step < k_block.n_steps; step += kRunSteps) {
      const int64_t n_run = min_of(kRunSteps, k_block.n_steps - step);
      for (int64_t i = 0; i < private_panels.span.size(); ++i) {
        for (int64_t j = 0; j < shared_panels.span.size(); ++j) {
          const int64_t row = kPrivateRows ? i : j, column = kPrivateRows ? j : i;
          check_ = check_ + gemm_panels(rows[row] + step * kStepFloats,
                                        columns[column] + step * kStepFloats, n_run, accumulators_,
                                        pending_);
          pending_ = pending_block(rows.span.begin + row, columns.span.begin + column,
                                   k_block.is_first && step == 0 && !args_.accumulate);
        }
      }
    }
  }

  // Returns false if some element of c is not finite.
  bool finish() {
    check_ = check_ + add_to_c(pending_, 0, WGPT_TARGET::kPanel);
    return reduce_add(check_) == 0.0f;
  }

 private:
  PendingBlock pending_block(int64_t row_panel, int64_t column_panel, bool from_zero) const {
    constexpr int64_t kSide = WGPT_TARGET::kPanel;
    const int64_t row = row_panel * kSide, column = column_panel * kSide;
    return {accumulators_,    static_cast<float*>(args_.c) + row * args_.c_row + column,
            args_.c_row,      min_of(kSide, args_.m - row),
            args_.n - column, from_zero};
  }

  const Amx16x64Dot::Scope scope_;
  const Gemm& args_;
  alignas(64) float accumulators_[WGPT_TARGET::kPanel *
                                  WGPT_TARGET::kPanel];  // added before the next are stored
  PendingBlock pending_{};
  Floats check_ = splat(0.0f);
};

#endif

}  // namespace wgpt::cpu::WGPT_TARGET

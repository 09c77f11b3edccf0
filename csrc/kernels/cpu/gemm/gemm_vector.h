// GEMM with vector FMAs on packed panels. The loops: gemm.h.
//
//   for each panel of rows, each strip of columns   an MR x NR register block (kRows x kColumns)
//
// A panel of rows over a k block stays in L1 while strips stream from L2: single elements of the panel are
// broadcast again and again, a strip is read once by whole vectors. A packed strip is [k][column]. A panel of
// rows is [row][k] where a is contiguous along k, else [k][row]: no transpose, since FMAs broadcast single
// elements of it, and the former need not be packed where a is whole panels. All of it counts in units
// (microkernel.h): where pairs of bfloat16 are multiplied at once, k counts pairs.
#pragma once

#include "kernels/cpu/gemm/microkernel.h"
#include "kernels/cpu/gemm/operand.h"
#include "kernels/cpu/gemm/pack.h"
#include "kernels/cpu/simd/typed_rows.h"

namespace wgpt::cpu::WGPT_TARGET {

template <typename ElementType>
class VectorGemm {
 public:
  using Element = ElementType;
  using Dot = typename DotOf<Element>::Type;
  static constexpr int kPerUnit = Dot::kPerUnit;
  static constexpr int kRows = 6, kColumnVectors = kVectors, kColumns = kColumnVectors * kLanes;
  template <bool kIsRows>
  static constexpr int64_t kPanel = kIsRows ? kRows : kColumns;
  template <bool kIsRows>
  static constexpr int64_t kFloatsPerDepth = kPanel<kIsRows> / kPerUnit;
  static constexpr int64_t kStepDepth = 16 * kPerUnit;
  static constexpr int64_t kKBlockDepth = 256 * kPerUnit;
  // 16-bit types are rounded once, after all of k.
  static constexpr bool kIsRounded = sizeof(Element) < sizeof(float);
  // Whether elements are converted when packed.
  static constexpr bool kIsWidened = kIsRounded && kPerUnit == 1;
  static constexpr int64_t kKSliceDepth = kIsRounded ? INT64_MAX : 4 * kKBlockDepth;
  // Panels that a task keeps in L2: 96 KiB of the private and 128 of the shared operand.
  template <bool kIsRows>
  static constexpr int64_t kPrivatePanels = 96 / kPanel<kIsRows>;
  template <bool kIsRows>
  static constexpr int64_t kSharedPanels = 128 / kPanel<kIsRows>;

  // For a task of these panels of rows and columns; accumulators: accumulator_floats() floats.
  VectorGemm(const Gemm& args, Span rows, Span columns, float* accumulators)
      : args_(args),
        rows_are_dense_(args.a_column == 1),
        accumulators_(accumulators),
        accumulators_row_(columns.size() * kColumns),
        first_accumulator_(rows.begin * kRows * accumulators_row_ + columns.begin * kColumns) {}

  static int64_t accumulator_floats(const Gemm& args, Span rows, Span columns) {
    const bool is_needed = kIsRounded && args.k > kKBlockDepth;
    return is_needed ? rows.size() * kRows * columns.size() * kColumns : 0;
  }

  template <bool kIsRows>
  static void pack(const Operand<Element>& x, int64_t i, int64_t k, int64_t n_steps, Span panels,
                   Span steps, float* out) {
    const int64_t begin = steps.begin * kStepDepth,
                  end = min_of(steps.end * kStepDepth, x.n_depth - k);
    const int64_t row = n_steps * kStepDepth / kPerUnit;  // units of a row of a dense panel
    if (x.depth != 1) return pack_outer<kIsRows>(x, i, k, row, panels, {begin, end}, out);
    for (int64_t p = panels.begin; p < panels.end; ++p) {
      const int64_t first = i + p * kPanel<kIsRows>;
      float* panel = out + p * kPanel<kIsRows> * row;
      if constexpr (kIsRows) {
        for (int64_t r = 0; r < kRows; ++r) {
          float* to = panel + r * row + begin / kPerUnit;
          if (first + r < x.n_outer) {
            copy_units(x.data + (first + r) * x.outer + k + begin, end - begin, to);
          } else {
            clear_floats(to, ceil_div(end - begin, kPerUnit));
          }
        }
      } else {
        pack_transposed(x, first, k, {begin, end}, panel);
      }
    }
  }

  static constexpr bool kReadsInPlace = !kIsWidened;

  // Whether rows may be read in place: contiguous along k, whole units, whole panels.
  static bool reads_in_place(const Operand<Element>& rows) {
    return rows.depth == 1 && rows.outer % kPerUnit == 0 && rows.n_depth % kPerUnit == 0 &&
           rows.n_outer % kRows == 0 && reinterpret_cast<uintptr_t>(rows.data) % sizeof(float) == 0;
  }

  static Panels in_place(const Operand<Element>& rows, const Span& panels, int64_t k) {
    const Element* first = rows.data + panels.begin * kRows * rows.outer + k;
    return {reinterpret_cast<const float*>(first), kRows * (rows.outer / kPerUnit), panels};
  }

  template <bool kPrivateRows>
  void accumulate(const Panels& rows, const Panels& columns, const KBlock& block) {
    for (int64_t i = 0; i < rows.span.size(); ++i) {
      for (int64_t j = 0; j < columns.span.size(); ++j) {
        const int64_t row = (rows.span.begin + i) * kRows,
                      column = (columns.span.begin + j) * kColumns;
        if (rows_are_dense_) {
          gemm_panels<true>(rows[i], rows.floats / kRows, columns[j], block, row, column);
        } else {
          gemm_panels<false>(rows[i], 1, columns[j], block, row, column);
        }
      }
    }
  }

  // Infinities and NaN come out right.
  bool finish() { return true; }

 private:
  // n elements as units; the last pair may be half a one.
  static void copy_units(const Element* from, int64_t n, float* out) {
    if constexpr (kIsWidened) {
      widen_row(from, n, out);
    } else {
      std::memcpy(out, from, static_cast<size_t>(n) * sizeof(Element));
      if (kPerUnit == 2 && n % 2 == 1)
        std::memset(reinterpret_cast<Element*>(out) + n, 0, sizeof(Element));
    }
  }

  // Units of n elements each of kPerUnit depths.
  static void join_depths(const Element* first, [[maybe_unused]] const Element* second, int64_t n,
                          float* out) {
    if constexpr (kPerUnit == 1) {
      copy_units(first, n, out);
    } else {
      int64_t i = 0;
#if defined(__AVX512BF16__)
      for (; i + 2 * kLanes <= n; i += 2 * kLanes) interleave(first + i, second + i, out + i);
#endif
      for (; i < n; ++i) {
        const Element pair[2] = {first[i], second[i]};
        std::memcpy(out + i, pair, sizeof(pair));
      }
    }
  }

  // Packs a matrix that is contiguous along its outer dimension (rows of a, columns of b). Software prefetch:
  // each step of k is in a page of its own, where the hardware prefetcher stops.
  template <bool kIsRows>
  static void pack_outer(const Operand<Element>& x, int64_t i, int64_t k, int64_t n_units,
                         Span panels, Span depths, float* out) {
    constexpr int64_t kWidth = kPanel<kIsRows>, kPanels = 32, kAhead = 8,
                      kLine = 64 / sizeof(Element);
    alignas(64) static constexpr Element kZeros[kPanels * kWidth] = {};
    alignas(64) float buffer[kPanels * kWidth];
    for (int64_t p = panels.begin; p < panels.end; p += kPanels) {
      const int64_t first = i + p * kWidth, n_panels = min_of(kPanels, panels.end - p);
      const int64_t n = max_of<int64_t>(0, min_of(n_panels * kWidth, x.n_outer - first));
      const bool is_copied = kIsRounded || n < n_panels * kWidth;
      clear_floats(buffer + n, n_panels * kWidth - n);
      for (int64_t depth = depths.begin; depth < depths.end; depth += kPerUnit) {
        const Element* from = x.data + first + (k + depth) * x.depth;
        for (int64_t d = 0; d < kPerUnit; ++d) {
          const int64_t ahead = min_of(kAhead * kPerUnit + d, x.n_depth - 1 - k - depth);
          for (int64_t i = 0; i < n; i += kLine) __builtin_prefetch(from + ahead * x.depth + i);
        }
        if (is_copied)
          join_depths(from, depth + 1 < depths.end ? from + x.depth : kZeros, n, buffer);
        const auto* row = is_copied ? buffer : reinterpret_cast<const float*>(from);
        float* to = out + p * kWidth * n_units + depth / kPerUnit * kWidth;
        for (int64_t j = 0; j < n_panels; ++j)
          std::memcpy(to + j * kWidth * n_units, row + j * kWidth, kWidth * sizeof(float));
      }
    }
  }

  // Packs a strip of columns from `first` on of a matrix that is contiguous along k.
  static void pack_transposed(const Operand<Element>& x, int64_t first, int64_t k, Span depths,
                              float* strip) {
    alignas(64) float block[kLanes * kLanes];
    for (int64_t column = 0; column < kColumns; column += kLanes) {
      const int64_t n = min_of<int64_t>(kLanes, x.n_outer - first - column);
      for (int64_t depth = depths.begin; depth < depths.end; depth += kLanes * kPerUnit) {
        const Element* from = x.data + (first + column) * x.outer + k + depth;
        const int64_t n_depth = min_of<int64_t>(kLanes * kPerUnit, depths.end - depth);
        float* to = strip + depth / kPerUnit * kColumns + column;
        if (n == kLanes && n_depth == kLanes && !kIsRounded) {
          transpose_block(from, x.outer, to, kColumns);
          continue;
        }
        clear_floats(block, kLanes * kLanes);
        for (int64_t r = 0; r < n; ++r) copy_units(from + r * x.outer, n_depth, block + r * kLanes);
        transpose_block(block, kLanes, to, kColumns);
      }
    }
  }

  template <bool kDenseRows>
  __attribute__((noinline)) void gemm_panels(const float* a, int64_t a_row, const float* b,
                                             const KBlock& block, int64_t row, int64_t column) {
    const int64_t n_rows = min_of<int64_t>(kRows, args_.m - row),
                  n_columns = min_of<int64_t>(kColumns, args_.n - column);
    auto* c = static_cast<Element*>(args_.c) + row * args_.c_row + column;
    for (int64_t r = 0; r < n_rows; ++r) {  // the k loop hides the latency
      __builtin_prefetch(c + r * args_.c_row, 1);
      __builtin_prefetch(c + r * args_.c_row + n_columns - 1, 1);
    }
    RegisterBlock<kRows, kColumnVectors> sums;
    fill_block(sums, 0.0f);
    const int64_t n_units = ceil_div(block.n_depth, kPerUnit);
    const int64_t a_step = kDenseRows ? 1 : kRows;
    // Unrolled: 2 to 4 % faster; in attention that gains nothing and takes half as long again to compile.
    _Pragma("GCC unroll 4") for (int64_t k = 0; k < n_units; ++k)
        gemm_unit<Dot>(a + k * a_step, a_row, b + k * kColumns, sums);
    const int64_t at = row * accumulators_row_ + column - first_accumulator_;
    const bool is_stored = !kIsRounded || block.is_last;
    const bool adds_accumulators = kIsRounded && !block.is_first;
    const bool adds_c =
        kIsRounded ? block.is_last && args_.accumulate : !block.is_first || args_.accumulate;
    if (n_rows == kRows && n_columns == kColumns) {
      WGPT_UNROLL for (int r = 0; r < kRows; ++r) {
        WGPT_UNROLL for (int v = 0; v < kColumnVectors; ++v) {
          Element* out = c + r * args_.c_row + v * kLanes;
          const int64_t mine = at + r * accumulators_row_ + v * kLanes;
          Floats x = sums[r][v];
          if (adds_accumulators) x = x + load(accumulators_ + mine);
          if (adds_c) x = x + load(out);
          is_stored ? store(out, x) : store(accumulators_ + mine, x);
        }
      }
      return;
    }
    alignas(64) float edge[kRows * kColumns];
    store_block(sums, edge, kColumns);
    for (int64_t r = 0; r < n_rows; ++r) {
      for (int64_t j = 0; j < n_columns; ++j) {
        Element& out = c[r * args_.c_row + j];
        const int64_t mine = at + r * accumulators_row_ + j;
        float x = edge[r * kColumns + j];
        if (adds_accumulators) x += accumulators_[mine];
        if (adds_c) x += WGPT_TARGET::widen(out);
        if (is_stored) {
          out = narrow<Element>(x);
        } else {
          accumulators_[mine] = x;
        }
      }
    }
  }

  const Gemm& args_;
  const bool rows_are_dense_;
  float* const accumulators_;
  const int64_t accumulators_row_, first_accumulator_;
};

}  // namespace wgpt::cpu::WGPT_TARGET

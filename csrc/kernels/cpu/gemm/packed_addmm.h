// packed_addmm on every target: the formula stands in kernels/packed_addmm.h.
//
//   task = a panel of columns, a chunk of rows
//     for each few rows   their sums over all of k in registers, b straight from the panel
#pragma once

#include "kernels/cpu/gemm/microkernel.h"
#include "kernels/cpu/threads/tasks.h"
#include "kernels/packed_addmm.h"

namespace wgpt::cpu::WGPT_TARGET {

class PackedProduct {
  static constexpr int kMaxRows = 6;
  static constexpr int64_t kRowsOfTask = 8 * kMaxRows;

 public:
  PackedProduct(const PackedAddmm& args, const Executor& executor)
      : args_(args), executor_(executor) {
    // Measured: below this a second thread costs more than it takes over.
    constexpr int64_t kLeastWork = int64_t{1} << 18;
    if (args.m * args.n * args.k < kLeastWork) executor_.n_threads = 1;
  }

  void run() {
    const int64_t n_panels = ceil_div(args_.n, kPackedColumns);
    run_tasks(executor_, n_panels * ceil_div(args_.m, kRowsOfTask), [&](int64_t task) {
      const int64_t panel = task % n_panels, begin = task / n_panels * kRowsOfTask;
      const int64_t end = min_of(args_.m, begin + kRowsOfTask);
      for (int64_t row = begin; row < end; row += kMaxRows)
        multiply(min_of<int64_t>(kMaxRows, end - row), row, panel);
    });
  }

 private:
  // Vectors of columns that so many rows take at once.
  static constexpr int vectors_for(int n_rows) {
    int n = static_cast<int>(kPackedColumns) / kLanes;
    while (n_rows * n > (kRegisters == 32 ? 24 : 12)) n /= 2;
    return n;
  }

  void multiply(int64_t n_rows, int64_t row, int64_t panel) const {
    switch (n_rows) {
      case 1:
        return multiply_rows<1>(row, panel);
      case 2:
        return multiply_rows<2>(row, panel);
      case 3:
        return multiply_rows<3>(row, panel);
      case 4:
        return multiply_rows<4>(row, panel);
      case 5:
        return multiply_rows<5>(row, panel);
      default:
        return multiply_rows<kMaxRows>(row, panel);
    }
  }

  template <int kRows>
  __attribute__((noinline)) void multiply_rows(int64_t row, int64_t panel) const {
    constexpr int kColumnVectors = vectors_for(kRows), kColumns = kColumnVectors * kLanes;
    for (int64_t strip = 0; strip < kPackedColumns; strip += kColumns) {
      const int64_t column = panel * kPackedColumns + strip;
      if (column >= args_.n) return;
      const float* x = args_.x + row * args_.x_row;
      const float* b = args_.panels + panel * args_.k * kPackedColumns + strip;
      RegisterBlock<kRows, kColumnVectors> sums;
      fill_block(sums, 0.0f);
      for (int64_t k = 0; k < args_.k; k += kPackedDepth) {
        RegisterBlock<kRows, kColumnVectors> block;
        gemm_fresh_block<FloatDot>(x + k, args_.x_row, 1, b + k * kPackedColumns, kPackedColumns,
                                   min_of(kPackedDepth, args_.k - k), block);
        WGPT_UNROLL for (int r = 0; r < kRows; ++r) {
          WGPT_UNROLL for (int v = 0; v < kColumnVectors; ++v) sums[r][v] =
              sums[r][v] + block[r][v];
        }
      }
      if (column + kColumns <= args_.n) {
        WGPT_UNROLL for (int r = 0; r < kRows; ++r) {
          float* y = y_at(row + r, column);
          const float* addend = addend_at(row + r, column);
          WGPT_UNROLL for (int v = 0; v < kColumnVectors; ++v) {
            const Floats sum = sums[r][v];
            store(y + v * kLanes, addend == nullptr ? sum : load(addend + v * kLanes) + sum);
          }
        }
        continue;
      }
      alignas(64) float edge[kRows * kColumns];
      store_block(sums, edge, kColumns);
      for (int64_t r = 0; r < kRows; ++r) {
        float* y = y_at(row + r, column);
        const float* addend = addend_at(row + r, column);
        for (int64_t j = 0; j < args_.n - column; ++j) {
          const float sum = edge[r * kColumns + j];
          y[j] = addend == nullptr ? sum : addend[j] + sum;
        }
      }
    }
  }

  float* y_at(int64_t row, int64_t column) const { return args_.y + row * args_.n + column; }
  const float* addend_at(int64_t row, int64_t column) const {
    return args_.addend == nullptr ? nullptr : args_.addend + row * args_.addend_row + column;
  }

  const PackedAddmm& args_;
  Executor executor_;
};

inline void packed_addmm(const PackedAddmm& args, const Executor& executor) {
  PackedProduct(args, executor).run();
}

}  // namespace wgpt::cpu::WGPT_TARGET

// GEMM with prepacked b for few rows, on every target: packed_addmm. The formula: kernels/gemm.h.
//
//   task = a panel of columns, a chunk of rows
//     for each 1 to 6 rows   a register block over all of k, b read in place from the panel
//
// With one row every byte of b is used once: 2 FLOPs for its 4, 2 or 1 bytes. From memory that is what
// limits; elements are widened in registers, in the shadow of the loads.
#pragma once

#include "kernels/cpu/gemm/microkernel.h"
#include "kernels/cpu/threads/tasks.h"
#include "kernels/gemm.h"

namespace wgpt::cpu::WGPT_TARGET {

// Element: of the panels, float, BFloat16 or int8_t.
template <typename Element>
class PrepackedGemm {
  static constexpr int kMaxRows = 6;
  static constexpr int64_t kRowsOfTask = 8 * kMaxRows;

 public:
  PrepackedGemm(const Gemm& args, const Executor& executor) : args_(args), executor_(executor) {
    // Measured: below this a second thread costs more than it takes over.
    constexpr int64_t kLeastWork = int64_t{1} << 18;
    if (args.m * args.n * args.k < kLeastWork) executor_.n_threads = 1;
  }

  void run() {
    const int64_t n_panels = ceil_div(args_.n, kPanelColumns);
    run_tasks(executor_, n_panels * ceil_div(args_.m, kRowsOfTask), [&](int64_t task) {
      const int64_t panel = task % n_panels, begin = task / n_panels * kRowsOfTask;
      const int64_t end = min_of(args_.m, begin + kRowsOfTask);
      for (int64_t row = begin; row < end; row += kMaxRows)
        run_rows(min_of<int64_t>(kMaxRows, end - row), row, panel);
    });
  }

 private:
  // Vectors of columns in the register block of so many rows.
  static constexpr int vectors_for(int n_rows) {
    int n = static_cast<int>(kPanelColumns) / kLanes;
    while (n_rows * n > (kRegisters == 32 ? 24 : 12)) n /= 2;
    return n;
  }

  void run_rows(int64_t n_rows, int64_t row, int64_t panel) const {
    switch (n_rows) {
      case 1:
        return gemm_rows<1>(row, panel);
      case 2:
        return gemm_rows<2>(row, panel);
      case 3:
        return gemm_rows<3>(row, panel);
      case 4:
        return gemm_rows<4>(row, panel);
      case 5:
        return gemm_rows<5>(row, panel);
      default:
        return gemm_rows<kMaxRows>(row, panel);
    }
  }

  template <int kRows>
  __attribute__((noinline)) void gemm_rows(int64_t row, int64_t panel) const {
    constexpr int kColumnVectors = vectors_for(kRows), kColumns = kColumnVectors * kLanes;
    for (int64_t strip = 0; strip < kPanelColumns; strip += kColumns) {
      const int64_t column = panel * kPanelColumns + strip;
      if (column >= args_.n) return;
      const float* a = static_cast<const float*>(args_.a) + row * args_.a_row;
      const Element* b =
          static_cast<const Element*>(args_.b) + panel * args_.k * kPanelColumns + strip;
      RegisterBlock<kRows, kColumnVectors> sums;
      fill_block(sums, 0.0f);
      for (int64_t k = 0; k < args_.k; k += kPrepackedDepth) {
        RegisterBlock<kRows, kColumnVectors> block;
        fill_block(block, 0.0f);
        for (int64_t i = k; i < min_of(k + kPrepackedDepth, args_.k); ++i) {
          gemm_unit<FloatDot>(a + i, args_.a_row, b + i * kPanelColumns, block);
        }
        WGPT_UNROLL for (int r = 0; r < kRows; ++r) {
          WGPT_UNROLL for (int v = 0; v < kColumnVectors; ++v) sums[r][v] =
              sums[r][v] + block[r][v];
        }
      }
      if (args_.b_scale != nullptr) scale_columns(column, sums);
      if (column + kColumns <= args_.n) {
        WGPT_UNROLL for (int r = 0; r < kRows; ++r) {
          float* c = c_at(row + r, column);
          const float* addend = addend_at(row + r, column);
          WGPT_UNROLL for (int v = 0; v < kColumnVectors; ++v) {
            const Floats sum = sums[r][v];
            store(c + v * kLanes, addend == nullptr ? sum : load(addend + v * kLanes) + sum);
          }
        }
        continue;
      }
      alignas(64) float edge[kRows * kColumns];
      store_block(sums, edge, kColumns);
      for (int64_t r = 0; r < kRows; ++r) {
        float* c = c_at(row + r, column);
        const float* addend = addend_at(row + r, column);
        for (int64_t j = 0; j < args_.n - column; ++j) {
          const float sum = edge[r * kColumns + j];
          c[j] = addend == nullptr ? sum : addend[j] + sum;
        }
      }
    }
  }

  template <int kRows, int kColumnVectors>
  void scale_columns(int64_t column, RegisterBlock<kRows, kColumnVectors>& sums) const {
    constexpr int kColumns = kColumnVectors * kLanes;
    alignas(64) float scale[kColumns] = {};
    const int64_t n = min_of<int64_t>(kColumns, args_.n - column);
    std::memcpy(scale, args_.b_scale + column, static_cast<size_t>(n) * sizeof(float));
    WGPT_UNROLL for (int v = 0; v < kColumnVectors; ++v) {
      const Floats factor = load(scale + v * kLanes);
      WGPT_UNROLL for (int r = 0; r < kRows; ++r) sums[r][v] = sums[r][v] * factor;
    }
  }

  float* c_at(int64_t row, int64_t column) const {
    return static_cast<float*>(args_.c) + row * args_.c_row + column;
  }
  const float* addend_at(int64_t row, int64_t column) const {
    if (args_.addend == nullptr) return nullptr;
    return static_cast<const float*>(args_.addend) + row * args_.addend_row + column;
  }

  const Gemm& args_;
  Executor executor_;
};

inline void run_prepacked_gemm(const Gemm& args, const Executor& executor) {
  switch (args.b_type) {
    case PanelType::kFloat32:
      return PrepackedGemm<float>(args, executor).run();
    case PanelType::kBFloat16:
      return PrepackedGemm<BFloat16>(args, executor).run();
    case PanelType::kInt8:
      return PrepackedGemm<int8_t>(args, executor).run();
  }
}

}  // namespace wgpt::cpu::WGPT_TARGET

// packed_addmm: y = addend + x b, where an element of y has the same bits whatever the other rows are and
// however many there are. For generation, where an item of a batch shall get what it gets alone, and where
// the same b meets a few rows again and again.
//
//   y[i, j] = addend[i, j] + sum_k x[i, k] b[k, j]
//
// float32 throughout; b is packed once, by columns: panel p holds columns [64 p, 64 p + 64), those past n as
// zeros. k is summed in blocks of kPackedDepth, each in order, and the blocks in order.
//
// Bytes: all of b, so with few rows the limit is what reads it; with many it is the multiply-adds.
#pragma once

#include "kernels/common.h"

namespace wgpt {

constexpr int64_t kPackedColumns = 64, kPackedDepth = 256;

struct PackedAddmm {
  int64_t m, n, k;
  const float* x;  // (m, k), rows x_row apart
  int64_t x_row;
  const float* panels;  // (ceil(n / kPackedColumns), k, kPackedColumns)
  const float* addend;  // (m, n), rows addend_row apart (0: one row for all), or nullptr for zero
  int64_t addend_row;
  float* y;  // (m, n)
};

}  // namespace wgpt

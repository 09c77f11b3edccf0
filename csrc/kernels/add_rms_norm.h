// add_rms_norm: the residual sum of a pre-norm block and its RMS norm, in one pass over memory.
//
//   s = x + delta,   r[n] = 1 / sqrt(mean_c s[n,c]^2 + eps),   y[n,c] = s[n,c] r[n] weight[c]
//
// x, s (N, C) in the stream's type; delta (N, C) or nullptr for zero, y (N, C), each in a type of
// its own; weight (C,), r (N,) float32. All float64 or none. Everything contiguous. Arithmetic in
// float32 (float64); s is rounded to its type before it is normalised, so that backward sees the
// same s.
//
// Backward, with h = s r and g = d_y weight:
//
//   d_s = d_sum + r (g - h mean_c(g h)),   d_weight[c] = sum_n d_y[n,c] h[n,c]
//
// d_x and d_delta are d_s in their types. d_weight sums blocks of kAddRmsNormRows rows, then the
// blocks in order: the same bits for any number of threads.
//
// Bytes: forward reads x, delta and writes s, y; backward reads d_sum, d_y, s and writes d_x (and
// d_delta where its type differs). Memory-bound, the limit is a copy.
#pragma once

#include <cstddef>

#include "kernels/common.h"

namespace wgpt {

constexpr int64_t kAddRmsNormRows = 64;

struct AddRmsNormShape {
  DType stream, delta, y;
  int64_t rows, channels;
};

struct AddRmsNormForward {
  AddRmsNormShape shape;
  const void *x, *delta, *weight;  // delta may be nullptr
  void *sum, *y, *inv_rms;         // sum is nullptr when delta is
  double eps;
};

struct AddRmsNormBackward {
  AddRmsNormShape shape;
  const void *d_sum, *d_y, *sum, *inv_rms, *weight;  // d_sum may be nullptr
  void *d_x, *d_delta, *d_weight;                    // d_delta is nullptr where it would equal d_x
  void* workspace;                                   // add_rms_norm_backward_workspace_bytes(shape)
};

inline size_t add_rms_norm_backward_workspace_bytes(const AddRmsNormShape& shape) {
  const int64_t n_blocks = (shape.rows + kAddRmsNormRows - 1) / kAddRmsNormRows;
  const size_t element = shape.stream == DType::kFloat64 ? sizeof(double) : sizeof(float);
  return static_cast<size_t>(n_blocks * shape.channels) * element;
}

}  // namespace wgpt

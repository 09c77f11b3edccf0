// Rows whose element type is known only at run time, read into and written from the arithmetic type.
#pragma once

#include "kernels/cpu/simd/rows.h"

namespace wgpt::cpu::WGPT_TARGET {

// out[i] = row[i]
template <typename Element>
inline void widen_row(const Element* __restrict row, int64_t n,
                      Arithmetic<Element>* __restrict out) {
  const int64_t n_vector = vector_part<Element>(n);
  if constexpr (sizeof(Element) < sizeof(double)) {
    for (int64_t i = 0; i < n_vector; i += kLanes) store(out + i, load(row + i));
  }
  for (int64_t i = n_vector; i < n; ++i) out[i] = widen(row[i]);
}

// Elements [offset, offset + n) of a tensor. Sum is double exactly where the tensor is.
template <typename Sum>
inline void read_row(DType dtype, const void* tensor, int64_t offset, int64_t n, Sum* out) {
  if constexpr (sizeof(Sum) == sizeof(double)) {
    widen_row(static_cast<const double*>(tensor) + offset, n, out);
  } else if (dtype == DType::kFloat32) {
    widen_row(static_cast<const float*>(tensor) + offset, n, out);
  } else if (dtype == DType::kBFloat16) {
    widen_row(static_cast<const BFloat16*>(tensor) + offset, n, out);
  } else {
    widen_row(static_cast<const Float16*>(tensor) + offset, n, out);
  }
}

template <typename Sum>
inline void write_row(DType dtype, const Sum* row, int64_t n, void* tensor, int64_t offset) {
  if constexpr (sizeof(Sum) == sizeof(double)) {
    round_row(row, n, static_cast<double*>(tensor) + offset);
  } else if (dtype == DType::kFloat32) {
    round_row(row, n, static_cast<float*>(tensor) + offset);
  } else if (dtype == DType::kBFloat16) {
    round_row(row, n, static_cast<BFloat16*>(tensor) + offset);
  } else {
    round_row(row, n, static_cast<Float16*>(tensor) + offset);
  }
}

}  // namespace wgpt::cpu::WGPT_TARGET

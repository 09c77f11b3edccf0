// Whole rows of any length in the vector API: add, convert, normalise. The last few elements go one
// by one; a double row always does, at the compiler's own discretion.
#pragma once

#include "kernels/cpu/simd/vec.h"

namespace wgpt::cpu::WGPT_TARGET {

// Elements that the vector loop of a row of n covers.
template <typename Element>
inline int64_t vector_part(int64_t n) {
  return sizeof(Element) == sizeof(double) ? 0 : n - n % kLanes;
}

// sum[i] += row[i]
template <typename Element>
inline void accumulate_row(const Element* __restrict row, int64_t n,
                           Arithmetic<Element>* __restrict sum) {
  const int64_t n_vector = vector_part<Element>(n);
  if constexpr (sizeof(Element) < sizeof(double)) {
    for (int64_t i = 0; i < n_vector; i += kLanes) store(sum + i, load(sum + i) + load(row + i));
  }
  for (int64_t i = n_vector; i < n; ++i) sum[i] += widen(row[i]);
}

// out[i] = row[i], rounded once.
template <typename Element>
inline void round_row(const Arithmetic<Element>* __restrict row, int64_t n,
                      Element* __restrict out) {
  const int64_t n_vector = vector_part<Element>(n);
  if constexpr (sizeof(Element) < sizeof(double)) {
    for (int64_t i = 0; i < n_vector; i += kLanes) store(out + i, load(row + i));
  }
  for (int64_t i = n_vector; i < n; ++i) out[i] = narrow<Element>(row[i]);
}

// out[i] = a[i] + b[i]; b may be nullptr.
template <typename Element>
inline void add_rows(const Element* __restrict a, const Element* __restrict b, int64_t n,
                     Element* __restrict out) {
  if (b == nullptr) {
    std::memcpy(out, a, static_cast<size_t>(n) * sizeof(Element));
    return;
  }
  const int64_t n_vector = vector_part<Element>(n);
  if constexpr (sizeof(Element) < sizeof(double)) {
    for (int64_t i = 0; i < n_vector; i += kLanes) store(out + i, load(a + i) + load(b + i));
  }
  for (int64_t i = n_vector; i < n; ++i) out[i] = narrow<Element>(widen(a[i]) + widen(b[i]));
}

// out[i] = (row[i] - mean[i]) * inv_std[i]
template <typename Sum, typename Element, typename Out>
inline void normalise_row(const Element* __restrict row, const Sum* __restrict mean,
                          const Sum* __restrict inv_std, int64_t n, Out* __restrict out) {
  const int64_t n_vector = vector_part<Sum>(n);
  if constexpr (sizeof(Sum) < sizeof(double)) {
    for (int64_t i = 0; i < n_vector; i += kLanes) {
      store(out + i, (load(row + i) - load(mean + i)) * load(inv_std + i));
    }
  }
  for (int64_t i = n_vector; i < n; ++i)
    out[i] = narrow<Out>((static_cast<Sum>(widen(row[i])) - mean[i]) * inv_std[i]);
}

}  // namespace wgpt::cpu::WGPT_TARGET

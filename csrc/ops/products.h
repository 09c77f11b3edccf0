// Matrix products of torch's own library inside blocks of work that this op spreads itself.
//
// Each product runs on the one thread that owns its block: what it writes is read again from that
// core's cache, and the bits do not depend on the number of threads, which a product spread over
// all of them would not promise.
#pragma once

#include <algorithm>
#include <atomic>
#include <utility>

#include "ops/runtime.h"

namespace wgpt {

// A matrix by its first element and strides; rows and columns may be swapped or cut without a copy.
struct Matrix {
  char* data;
  int64_t rows, columns, row_stride, column_stride;
  ScalarType dtype;
  int64_t element_size;

  explicit Matrix(const Tensor& tensor);  // (rows, columns), dense rows
  Matrix transposed() const;
  Matrix slice_rows(int64_t begin, int64_t end) const;
  Matrix slice_columns(int64_t begin, int64_t end) const;
  int64_t numel() const { return rows * columns; }
};

void multiply(const Matrix& out, const Matrix& a, const Matrix& b);  // out = a b

// Calls body(begin, end) for blocks of [0, n), `size` at a time, each block on one thread. The range
// given to the pool is never a single step: torch would run that outside of a parallel region, where
// a product spreads itself.
template <typename Body>
void for_each_block(int64_t n, int64_t size, const Body& body) {
  const Executor executor = torch_executor();
  const int64_t n_blocks = (n + size - 1) / size;
  std::atomic<int64_t> next{0};
  parallel_for(executor, std::max<int64_t>(executor.n_threads, 2), 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < n_blocks; i = next++) body(i * size, std::min((i + 1) * size, n));
  });
}

// out = a^T b for a (n, rows), b (n, columns), in strips of out's rows.
void multiply_transposed(const Matrix& out, const Matrix& a, const Matrix& b);

// For kernels called inside a block.
Executor this_thread();

}  // namespace wgpt

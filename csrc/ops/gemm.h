// Which GEMM runs for CPU tensors: the one of the CPU target in use, or torch's.
#pragma once

#include <cstdint>
#include <optional>

#include "ops/runtime.h"

namespace wgpt {

// GEMM of CPU tensors on all of torch's threads: out = a b, or out += a b. Runs the GEMM of the CPU target in
// use where it is faster (kernels/gemm.h), else torch's.
void gemm(const Tensor& out, const Tensor& a, const Tensor& b, bool accumulate = false);

// The b of several GEMMs: a target that packs it does so once.
struct ReusedOperand {
  Tensor b;
  std::optional<Tensor> packed = std::nullopt;
};
void gemm(const Tensor& out, const Tensor& a, ReusedOperand& b);

// Rows per block of an op that fuses GEMMs, so that the intermediates stay in the caches.
int64_t rows_per_block(int64_t n);

// Whether weight gradients accumulate block by block. 16-bit types would round at every block: they keep the
// intermediates of all rows, for one GEMM at the end.
bool accumulates_by_blocks(DType dtype);

}  // namespace wgpt

// Which GEMM runs: for CPU tensors the one of the CPU target in use or torch's, on CUDA torch's (cuBLAS).
#pragma once

#include <cstdint>
#include <optional>

#include "ops/runtime.h"

namespace wgpt {

// out = a b, or out += a b; of CPU tensors on all of torch's threads. There it runs the GEMM of the CPU target in
// use where that is faster (kernels/gemm.h), else torch's.
void gemm(const Tensor& out, const Tensor& a, const Tensor& b, bool accumulate = false);

// The b of several GEMMs: a target that packs it does so once.
struct ReusedOperand {
  Tensor b;
  std::optional<Tensor> packed = std::nullopt;
};
void gemm(const Tensor& out, const Tensor& a, ReusedOperand& b);

// Rows per block of an op that fuses GEMMs, of the rows of x: on the CPU so that the intermediates stay in the
// caches, on CUDA so that they do not fill the memory.
int64_t rows_per_block(const Tensor& x);

// Whether weight gradients accumulate block by block. 16-bit types would round at every block: they keep the
// intermediates of all rows, for one GEMM at the end.
bool accumulates_by_blocks(DType dtype);

}  // namespace wgpt

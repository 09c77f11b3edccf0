// Which GEMM runs for CPU tensors: the one of the CPU target in use, or torch's.
#pragma once

#include <cstdint>
#include <optional>

#include "ops/runtime.h"

namespace wgpt {

// Matrix products of CPU tensors on all of torch's threads: those of the CPU target in use where they are
// better (kernels/matmul.h), else torch's own. out = a b, or out += a b.
void multiply(const Tensor& out, const Tensor& a, const Tensor& b, bool accumulate = false);

// The b of several products. A target that packs it does so once.
struct SharedOperand {
  Tensor b;
  std::optional<Tensor> packed = std::nullopt;
};
void multiply(const Tensor& out, const Tensor& a, SharedOperand& b);

// Rows that an op between products takes at once, so that what lies between them stays in the caches.
int64_t rows_at_once(int64_t n);

// Whether gradients of weights are sums over such blocks; types that would round each of them keep what lies
// between the products of all rows, and make them of it at the end.
bool sums_by_blocks(DType dtype);

}  // namespace wgpt

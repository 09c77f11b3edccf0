// What the GEMM driver and its kernels share: operands by strides, panels, k blocks.
#pragma once

#include "kernels/cpu/simd/elements.h"
#include "kernels/gemm.h"

namespace wgpt::cpu::WGPT_TARGET {

// Where element (i, k) of an operand lies: i counts rows of a, columns of b.
template <typename Element>
struct Operand {
  const Element* data;
  int64_t outer, depth;  // strides
  int64_t n_outer, n_depth;
};

// Panels, steps or elements [begin, end).
struct Span {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// A block of k.
struct KBlock {
  int64_t n_depth, n_steps;  // elements of k, and steps of packed panels that hold them
  bool is_first, is_last;    // of all of k
};

// Panels of one operand for a block: panel i lies at data + i * floats.
struct Panels {
  const float* data;
  int64_t floats;
  Span span;  // which of all panels of the operand they are
  const float* operator[](int64_t i) const { return data + i * floats; }
};

}  // namespace wgpt::cpu::WGPT_TARGET

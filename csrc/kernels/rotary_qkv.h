// rotary_qkv: queries, keys and values out of one fused projection, queries and keys rotated (RoPE).
//
//   q[.., i]       = qkv[0][.., i] cos[t,i] - qkv[0][.., i + D/2] sin[t,i]
//   q[.., i + D/2] = qkv[0][.., i + D/2] cos[t,i] + qkv[0][.., i] sin[t,i]      for i < D/2
//
// k alike from qkv[1]; v = qkv[2]. qkv (B, T, 3, H, D); cos, sin (T, D/2) float32 (float64 for
// float64); q, k, v (B, T, H, D). All contiguous. Arithmetic in float32, rounded once.
//
// Backward rotates the other way and packs the three gradients into d_qkv: no stack of them, no pass
// of its own. Memory-bound: reads and writes each element once.
#pragma once

#include "kernels/common.h"

namespace wgpt {

struct RotaryShape {
  DType dtype;
  int64_t batch, steps, heads, head_dim;
};

struct RotaryForward {
  RotaryShape shape;
  const void *qkv, *cos, *sin;
  void *q, *k, *v;
};

struct RotaryBackward {
  RotaryShape shape;
  const void *dq, *dk, *dv, *cos, *sin;
  void* d_qkv;
};

}  // namespace wgpt

// flash_attention: softmax attention without a T x T matrix.
//
//   s[i,j] = scale * q[i] . k[j]          for every visible pair (i, j), else -inf
//   lse[i] = log sum_j exp(s[i,j])        p[i,j] = exp(s[i,j] - lse[i])        out[i] = sum_j p[i,j] v[j]
//
// q, out (B, Tq, H, D); k, v (B, Tk, H, D); lse (B, H, Tq), natural logarithm, contiguous. Query i stands at position
// i + Tk - Tq (the last query sees the last key), so Tq < Tk is a chunk, or one decoded step, against a key/value cache.
// Key j is visible when causal: j <= position; window > 0: position - window < j (and, not causal, j < position +
// window). Causal needs Tq <= Tk. With window 0 there is no window. Every query of a valid call sees a key.
//
// Backward recomputes p from lse:
//   delta[i] = d_out[i] . out[i] - d_lse[i]      ds[i,j] = p[i,j] (d_out[i] . v[j] - delta[i])
//   dq[i] = scale sum_j ds[i,j] k[j]     dk[j] = scale sum_i ds[i,j] q[i]     dv[j] = sum_i p[i,j] d_out[i]
//
// Element types: float32, bfloat16, float16 with float32 accumulation (lse float32); float64 on CPU only (lse float64).
// Deterministic: same inputs, same bits, for any number of threads. Memory O(T).
// FLOPs per visible pair: 4 D forward (two GEMMs), 10 D backward (five GEMMs), 14 D when dK/dV and dQ are separate
// passes (seven).
#pragma once

#include "kernels/common.h"

namespace wgpt {

// A (B, T, H, D) view; channels are contiguous.
struct HeadsView {
  void* data;
  int64_t batch_stride, step_stride, head_stride;
};

struct FlashAttentionShape {
  DType dtype;
  int64_t batch, q_steps, kv_steps, heads, head_dim;  // head_dim in {32, 64, 128}
  double scale;
  bool causal;
  int64_t window;  // 0: none
};

struct FlashAttentionForward {
  FlashAttentionShape shape;
  HeadsView q, k, v;  // read only
  HeadsView out;
  void* lse;        // (B, H, Tq) float32 (float64 for float64)
  void* workspace;  // flash_attention_*_forward_workspace_bytes(shape), 64-byte aligned
};

struct FlashAttentionBackward {
  FlashAttentionShape shape;
  HeadsView q, k, v, out, d_out;  // read only
  const void* lse;                // (B, H, Tq)
  const void* d_lse;              // (B, H, Tq), or nullptr for zero
  HeadsView dq, dk, dv;
  void* workspace;  // flash_attention_*_backward_workspace_bytes(shape), 64-byte aligned
};

}  // namespace wgpt

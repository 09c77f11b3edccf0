// flash_attention: softmax attention without a T x T matrix.
//
//   s[i,j] = scale * q[i] . k[j]          for every visible pair (i, j), else -inf
//   with softcap: s = softcap tanh(s / softcap)      with bias: s = s + bias[b,h,i,j], or -inf where a mask is false
//   lse[i] = log sum_j exp(s[i,j])        p[i,j] = exp(s[i,j] - lse[i])        out[i] = sum_j p[i,j] v[j]
//
// q, out (B, Tq, H, D); k, v (B, Tk, H / group, D); lse (B, H, Tq), natural logarithm,
// contiguous. Query head h reads key head h / group: grouped-query attention (group > 1) or, with
// one key head, multi-query. Query i stands at position i + Tk - Tq (the last query sees the last
// key), so Tq < Tk is a chunk, or one decoded step, against a key/value cache. Key j is visible
// when causal: j <= position; window > 0: position - window < j (and, not causal, j < position +
// window); first_key, if given: first_key[b,i] <= j. Causal needs Tq <= Tk. With window 0 there
// is no window.
// first_key (B, Tq) lies between 0 and the query's last visible key, and does not fall along a row. Every query of a
// valid call sees a key.
//
// Causal attention over packed documents: first_key is the start of the query's document. Where it is the query's own
// position, no key before is seen from there on: the row falls into segments that share neither queries nor keys. The
// bits of a segment, gradients included, depend on no other segment, NaN and infinities included; on the CPU they are
// those that it gets alone (backward: alone in a call of as many heads).
//
// softcap and bias are the CPU's alone. A query that bias leaves no key (all -inf) has out 0, lse -inf and no gradient.
//
// Backward recomputes p from lse:
//   delta[i] = d_out[i] . out[i] - d_lse[i]      ds[i,j] = p[i,j] (d_out[i] . v[j] - delta[i])
//   with softcap ds is multiplied by 1 - tanh^2; bias has no gradient
//   dq[i] = scale sum_j ds[i,j] k[j]     dk[j] = scale sum_i ds[i,j] q[i]     dv[j] = sum_i p[i,j] d_out[i]
// dk and dv sum over the queries of every head of the group, head by head.
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

// Channels that the kernels are compiled for.
constexpr int64_t kCpuHeadDims[] = {32, 64, 96, 128, 256}, kCudaHeadDims[] = {32, 64, 128};

struct FlashAttentionShape {
  DType dtype;
  int64_t batch, q_steps, kv_steps, heads, head_dim;  // a kernel's: kCpuHeadDims, kCudaHeadDims
  double scale;
  bool causal;
  int64_t window;      // 0: none
  int64_t group = 1;   // consecutive query heads that share a key head; CUDA: 1
  double softcap = 0;  // 0: none

  int64_t kv_heads() const { return heads / group; }
};

// (B, H, Tq, Tk) by strides, 0 along what is broadcast: added to the scores, or bytes that are 0 where a key is hidden.
struct ScoreBias {
  const void* data = nullptr;  // nullptr: none
  bool is_mask = false;
  DType dtype = DType::kFloat32;  // of what is no mask
  int64_t batch_stride = 0, head_stride = 0, query_stride = 0, key_stride = 0;
};

struct FlashAttentionForward {
  FlashAttentionShape shape;
  HeadsView q, k, v;         // read only
  const int32_t* first_key;  // (B, Tq), or nullptr for 0
  HeadsView out;
  void* lse;        // (B, H, Tq) float32 (float64 for float64)
  void* workspace;  // flash_attention_*_forward_workspace_bytes(shape), 64-byte aligned
  ScoreBias bias{};
};

struct FlashAttentionBackward {
  FlashAttentionShape shape;
  HeadsView q, k, v, out, d_out;  // read only
  const int32_t* first_key;       // (B, Tq), or nullptr for 0
  const void* lse;                // (B, H, Tq)
  const void* d_lse;              // (B, H, Tq), or nullptr for zero
  HeadsView dq, dk, dv;
  void* workspace;  // flash_attention_*_backward_workspace_bytes(shape), 64-byte aligned
  ScoreBias bias{};
};

}  // namespace wgpt

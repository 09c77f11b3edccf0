// token_concat: the two views of a step side by side, the early fusion of the hybrid model.
//
//   y[b,t, :Ct] = table[tokens[b,t]]      y[b,t, Ct:] = mel_hidden[b,t]      (+ pos[t] over all C = Ct + Cm channels)
//
// tokens (B, T) int64 contiguous, every one in [0, V) (checked by the caller); table (V, Ct) contiguous rows;
// mel_hidden (B, T, Cm), strides free but for the last, or nullptr with Cm = 0; pos (>= T, C) or nullptr; y contiguous.
//
// Backward: d_table[v] = sum over the steps whose token is v of d_y[b,t,:Ct], in a fixed order (CPU: ascending
// b*T + t; CUDA: pieces of it), in float32 (float64 for float64) and rounded once, by buckets: count, prefix sum,
// place, then one owner sums each row; no atomics on values, so the bits do not depend on threads. d_mel_hidden is
// d_y[..., Ct:], which is a view: nothing to do.
// d_pos[t] = sum_b d_y[b,t].
//
// Bytes: reads and writes C elements a step; memory-bound, the limit is a copy.
#pragma once

#include "kernels/common.h"

namespace wgpt {

struct TokenConcatShape {
  DType dtype;
  int64_t batch, steps, vocab, token_channels, mel_channels;
  int64_t mel_batch_stride, mel_step_stride;
};

struct TokenConcatForward {
  TokenConcatShape shape;
  const int64_t* tokens;
  const void *table, *mel_hidden, *pos;  // mel_hidden, pos may be nullptr
  void* y;
};

struct TokenConcatBackward {
  TokenConcatShape shape;
  const int64_t* tokens;
  const void* d_y;  // (B, T, C) contiguous
  void* d_table;    // (V, Ct)
  void* d_pos;      // (pos_rows, C): rows past T are zeroed; or nullptr
  int64_t pos_rows;
  void* workspace;  // token_concat_*_backward_workspace_bytes(shape), 64-byte aligned
};

}  // namespace wgpt

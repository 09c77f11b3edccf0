// token_concat_norm: the early fusion of the hybrid model with the norms on both of its sides, one kernel each way.
//
//   m[n] = rms_norm(x[n] + delta[n]) mel_weight            the last norm of the mel branch
//   cat[n] = (table[tokens[n]], m[n])                      token_concat, C = Ct + Cm
//   y[n] = rms_norm(cat[n]) weight                         the first norm of the decoder
//
// with rms_norm(s) = s / sqrt(mean_c s[c]^2 + eps). tokens (N,) int64; table (V, Ct) and cat (N, C) of one type; x,
// delta (N, Cm), delta nullptr for zero, and y (N, C), each in a type of its own; mel_weight (Cm,), weight (C,) and both
// reciprocals of the root mean square (N,) float32. Everything contiguous; C at most kTokenConcatNormChannels, where 4
// does not divide Ct and Cm, or 16 an address, at most kTokenConcatNormOddChannels. x + delta
// is rounded to the type of x, m to that of table.
//
// Backward: d_tokens (N, Ct), whose sums by token are d_table (token_concat's backward), d_x, d_delta where its type
// differs, and d_weights (C + Cm,) float32, those of weight before those of mel_weight. For CUDA alone.
#pragma once

#include "kernels/common.h"

namespace wgpt {

constexpr int64_t kTokenConcatNormChannels = 768, kTokenConcatNormOddChannels = 256;

struct TokenConcatNormShape {
  DType table, x, delta, y;
  int64_t rows, vocab, token_channels, mel_channels;
};

struct TokenConcatNormForward {
  TokenConcatNormShape shape;
  const int64_t* tokens;
  const void *table, *x, *delta, *mel_weight, *weight;  // delta may be nullptr
  void *cat, *y, *mel_inv_rms, *inv_rms;
  double mel_eps, eps;
};

struct TokenConcatNormBackward {
  TokenConcatNormShape shape;
  const void *d_cat, *d_y, *cat, *x, *delta, *mel_inv_rms, *inv_rms, *mel_weight, *weight;
  void *d_tokens, *d_x, *d_delta, *d_weights;  // d_cat, d_delta may be nullptr
  void* workspace;                             // token_concat_norm_backward_workspace_bytes(shape)
};

}  // namespace wgpt

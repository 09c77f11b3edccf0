// mel_embed: each step's mel slice, normalised, projected and activated in one pass; a causal strided convolution
// whose unfolded input is never written.
//
//   x[t, (f, m)] = (frames[t*r + r-1 - (c+r-1) + f, m] - mean[m]) * inv_std[m]      f in [0, c + r), 0 before frame 0
//   y[t]         = gelu(weight x[t] + bias)  (+ pos[t])                             gelu: exact, x Phi(x)
//
// frames (B, F, M) with F = T*r, strides free but for the last; mean, inv_std (M,) float32 (float64 for float64);
// weight (Cm, (c+r)*M) contiguous; bias (Cm,); pos (>= T, Cm) contiguous rows or nullptr; y (B, T, Cm) contiguous.
// A step sees the r frames that end with it and c frames of left context. The zero stands after normalisation: an
// absent frame says "the mean".
//
// Where gradients will be wanted, forward also writes slope = gelu'(weight x + bias): its exponential is at hand there,
// and backward then needs neither the GEMM again nor weight and bias. With g = d_y * slope,
//   d_bias = sum_{b,t} g    d_weight = sum_{b,t} g x^T    d_pos[t] = sum_b d_y[b,t]     (frames, mean, inv_std are data)
//
// float32, bfloat16, float16 with float32 accumulation (and a float32 sum over all steps); float64 on CPU.
// frames may be float32 or float16 data whatever the parameters' type is: frames_dtype says.
// Deterministic: reductions have a fixed order that does not depend on the number of threads.
#pragma once

#include "kernels/common.h"

namespace wgpt {

struct MelEmbedShape {
  DType dtype;         // of weight, bias, pos, y and their gradients
  DType frames_dtype;  // kFloat32 or kFloat16, or equal to dtype
  int64_t batch, steps, mels, channels;
  int64_t frames_per_step, context_frames;  // r, c
  int64_t frames_batch_stride, frames_frame_stride;
};

struct MelEmbedForward {
  MelEmbedShape shape;
  const void* frames;
  const void *mean, *inv_std;
  const void *weight, *bias, *pos;  // pos may be nullptr
  void* y;
  void* slope;  // (B, T, Cm) contiguous, of dtype; nullptr where no gradient will be wanted
};

struct MelEmbedBackward {
  MelEmbedShape shape;
  const void* frames;
  const void *mean, *inv_std;
  const void *d_y, *slope;  // (B, T, Cm) contiguous
  void *d_weight, *d_bias,
      *d_pos;  // d_pos (pos_rows, Cm): rows past T are zeroed; nullptr when pos was
  int64_t pos_rows;
  void* workspace;  // mel_embed_*_backward_workspace_bytes(shape), 64-byte aligned
};

}  // namespace wgpt

// mel_embed in float64, step by step: for gradient checks, not for speed. Formula and shapes:
// kernels/mel_embed.h.
#pragma once

#include "kernels/cpu/elementwise/gelu.h"
#include "kernels/cpu/simd/rows.h"
#include "kernels/cpu/threads/tasks.h"
#include "kernels/mel_embed.h"

namespace wgpt::cpu::WGPT_TARGET {

inline int64_t mel_slice_size(const MelEmbedShape& shape) {
  return (shape.frames_per_step + shape.context_frames) * shape.mels;
}

// Normalised frames [first, first + n) of sequence b, one after another; zero before the sequence's
// first.
template <typename Frame, typename Out>
inline void normalise_frames(const MelEmbedShape& shape, const void* frames, const void* mean,
                             const void* inv_std, int64_t b, int64_t first, int64_t n, Out* out) {
  using Sum = Arithmetic<Out>;
  const Frame* sequence = static_cast<const Frame*>(frames) + b * shape.frames_batch_stride;
  for (int64_t i = 0; i < n; ++i) {
    Out* row = out + i * shape.mels;
    if (first + i < 0) {
      std::memset(row, 0, static_cast<size_t>(shape.mels) * sizeof(Out));
    } else {
      normalise_row(sequence + (first + i) * shape.frames_frame_stride,
                    static_cast<const Sum*>(mean), static_cast<const Sum*>(inv_std), shape.mels,
                    row);
    }
  }
}

// The slice of one step (K,) and its pre-activation (Cm,).
template <typename Frame>
inline void project_step(const MelEmbedForward& args, int64_t b, int64_t t, double* x, double* z) {
  const MelEmbedShape& shape = args.shape;
  const int64_t width = shape.frames_per_step + shape.context_frames, k = mel_slice_size(shape);
  normalise_frames<Frame>(shape, args.frames, args.mean, args.inv_std, b,
                          t * shape.frames_per_step - shape.context_frames, width, x);
  for (int64_t c = 0; c < shape.channels; ++c) {
    z[c] = static_cast<const double*>(args.bias)[c];
    for (int64_t i = 0; i < k; ++i)
      z[c] += x[i] * static_cast<const double*>(args.weight)[c * k + i];
  }
}

template <typename Frame>
void mel_embed_forward_float64(const MelEmbedForward& args, const Executor& executor) {
  const MelEmbedShape& shape = args.shape;
  const int64_t k = mel_slice_size(shape), cm = shape.channels;
  run_tasks(executor, shape.batch * shape.steps, [&](int64_t row) {
    auto* x = static_cast<double*>(thread_scratch(static_cast<size_t>(k + cm) * sizeof(double)));
    double* z = x + k;
    const int64_t t = row % shape.steps;
    project_step<Frame>(args, row / shape.steps, t, x, z);
    for (int64_t c = 0; c < cm; ++c) {
      const double position =
          args.pos == nullptr ? 0.0 : static_cast<const double*>(args.pos)[t * cm + c];
      static_cast<double*>(args.y)[row * cm + c] = gelu(z[c]) + position;
      if (args.slope != nullptr) static_cast<double*>(args.slope)[row * cm + c] = gelu_slope(z[c]);
    }
  });
}

// One task owns a channel and loops over all steps: slow, and free of partial sums.
template <typename Frame>
void mel_embed_backward_float64(const MelEmbedBackward& args, const Executor& executor) {
  const MelEmbedShape& shape = args.shape;
  const int64_t k = mel_slice_size(shape), cm = shape.channels,
                width = shape.frames_per_step + shape.context_frames;
  run_tasks(executor, cm, [&](int64_t c) {
    auto* x = static_cast<double*>(thread_scratch(static_cast<size_t>(k) * sizeof(double)));
    double* d_weight = static_cast<double*>(args.d_weight) + c * k;
    double d_bias = 0;
    for (int64_t i = 0; i < k; ++i) d_weight[i] = 0;
    for (int64_t row = 0; row < shape.batch * shape.steps; ++row) {
      normalise_frames<Frame>(shape, args.frames, args.mean, args.inv_std, row / shape.steps,
                              row % shape.steps * shape.frames_per_step - shape.context_frames,
                              width, x);
      const double g = static_cast<const double*>(args.d_y)[row * cm + c] *
                       static_cast<const double*>(args.slope)[row * cm + c];
      d_bias += g;
      for (int64_t i = 0; i < k; ++i) d_weight[i] += g * x[i];
    }
    static_cast<double*>(args.d_bias)[c] = d_bias;
  });
}

}  // namespace wgpt::cpu::WGPT_TARGET

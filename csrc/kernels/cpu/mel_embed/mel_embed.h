// mel_embed on the CPU: which code runs for the types.
#pragma once

#include "kernels/cpu/mel_embed/mel_embed_gemm.h"

namespace wgpt::cpu::WGPT_TARGET {

template <typename Dot>
inline int64_t mel_partials_floats(const MelEmbedShape& shape) {
  const MelChunks chunks = mel_chunks<Dot>(shape);
  return chunks.n_chunks * chunks.partial_floats;
}

inline size_t mel_embed_backward_workspace_bytes(const MelEmbedShape& shape) {
  if (shape.dtype == DType::kFloat64) return 0;
  const int64_t n_floats = max_of(mel_partials_floats<FloatDot>(shape),
                                  mel_partials_floats<DotOf<BFloat16>::Type>(shape));
  return static_cast<size_t>(n_floats) * sizeof(float);
}

// Calls body(Dot{}): a bfloat16 micro-kernel where there is one and a slice is whole vectors of pairs, else
// float32 FMAs. The slice decides, not the number of steps: a step has the same bits whatever the others are.
template <typename Element, typename Body>
inline void with_mel_dot(const MelEmbedShape& shape, Body&& body) {
  using Dot = typename DotOf<Element>::Type;
  if constexpr (Dot::kPerUnit == 2) {
    if (shape.mels % (2 * kLanes) == 0) return body(Dot{});
  }
  body(FloatDot{});
}

// Calls body(Element{}, Frame{}).
template <typename Body>
inline void with_mel_types(const MelEmbedShape& shape, Body&& body) {
  with_element(shape.dtype, [&](auto element) {
    if (shape.frames_dtype == shape.dtype) return body(element, element);
    if (shape.frames_dtype == DType::kFloat16) return body(element, Float16{});
    return body(element, float{});
  });
}

inline void mel_embed_forward(const MelEmbedForward& args, const Executor& executor) {
  with_mel_types(args.shape, [&](auto element, auto frame) {
    using Element = decltype(element);
    using Frame = decltype(frame);
    if constexpr (sizeof(Element) == sizeof(double)) {
      mel_embed_forward_float64<Frame>(args, executor);
    } else {
      with_mel_dot<Element>(args.shape, [&](auto dot) {
        mel_embed_forward_blocks<Element, Frame, decltype(dot)>(args, executor);
      });
    }
  });
}

inline void mel_embed_backward(const MelEmbedBackward& args, const Executor& executor) {
  with_mel_types(args.shape, [&](auto element, auto frame) {
    using Element = decltype(element);
    using Frame = decltype(frame);
    if constexpr (sizeof(Element) == sizeof(double)) {
      mel_embed_backward_float64<Frame>(args, executor);
      if (args.d_pos == nullptr) return;
      run_tasks(executor, sum_over_batch_tasks(args.pos_rows),
                [&](int64_t task) { sum_mel_pos<double>(args, task); });
    } else {
      with_mel_dot<Element>(args.shape, [&](auto dot) {
        mel_embed_backward_blocks<Element, Frame, decltype(dot)>(args, executor);
      });
    }
  });
}

}  // namespace wgpt::cpu::WGPT_TARGET

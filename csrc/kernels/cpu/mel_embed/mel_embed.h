// mel_embed on the CPU: which code runs for the types.
#pragma once

#include "kernels/cpu/mel_embed/mel_embed_amx.h"

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

// Calls body(Dot{}): products of pairs where there are any and a slice is made of whole vectors of
// them, else of floats.
template <typename Element, typename Body>
inline void with_mel_dot(const MelEmbedShape& shape, Body&& body) {
  using Dot = typename DotOf<Element>::Type;
  if constexpr (Dot::kPerUnit == 2) {
    if (shape.mels % (2 * kLanes) == 0) return body(Dot{});
  }
  body(FloatDot{});
}

// The op by products of split numbers. False where the target or the slice has none of them or a sum is
// not finite: then with_mel_dot's are to be made. What decides is the slice, not the number of steps, so
// that a step has the same bits among whatever others.
template <typename Element, typename Frame, typename Args>
inline bool made_by_splits([[maybe_unused]] const Args& args,
                           [[maybe_unused]] const Executor& executor) {
#if defined(__AMX_BF16__)
  if constexpr (std::is_same_v<Element, float>) return mel_embed_by_splits<Frame>(args, executor);
#endif
  return false;
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
      mel_embed_forward_by_rows<Frame>(args, executor);
    } else if (!made_by_splits<Element, Frame>(args, executor)) {
      with_mel_dot<Element>(args.shape, [&](auto dot) {
        mel_embed_forward_by_tiles<Element, Frame, decltype(dot)>(args, executor);
      });
    }
  });
}

inline void mel_embed_backward(const MelEmbedBackward& args, const Executor& executor) {
  with_mel_types(args.shape, [&](auto element, auto frame) {
    using Element = decltype(element);
    using Frame = decltype(frame);
    if constexpr (sizeof(Element) == sizeof(double)) {
      mel_embed_backward_by_rows<Frame>(args, executor);
      if (args.d_pos == nullptr) return;
      run_tasks(executor, sum_over_batch_tasks(args.pos_rows),
                [&](int64_t task) { sum_mel_pos<double>(args, task); });
    } else if (!made_by_splits<Element, Frame>(args, executor)) {
      with_mel_dot<Element>(args.shape, [&](auto dot) {
        mel_embed_backward_by_tiles<Element, Frame, decltype(dot)>(args, executor);
      });
    }
  });
}

}  // namespace wgpt::cpu::WGPT_TARGET

// feed_forward's GELU passes on the CPU. Formula: kernels/feed_forward.h.
#pragma once

#include "kernels/cpu/elementwise/gelu.h"
#include "kernels/cpu/simd/rows.h"
#include "kernels/cpu/threads/tasks.h"
#include "kernels/feed_forward.h"

namespace wgpt::cpu::WGPT_TARGET {

constexpr int64_t kGeluPerTask = 16384;

// Calls body(begin, end) over [0, n) in pieces of whole vectors.
template <typename Body>
void run_pieces(const Executor& executor, int64_t n, Body&& body) {
  run_tasks(executor, ceil_div(n, kGeluPerTask),
            [&](int64_t task) { body(task * kGeluPerTask, min_of((task + 1) * kGeluPerTask, n)); });
}

template <typename Element>
void gelu_forward_as(const GeluForward& args, const Executor& executor) {
  const auto* z = static_cast<const Element*>(args.z);
  auto* active = static_cast<Element*>(args.active);
  const auto& activate = gelu_of<Element>();
  run_pieces(executor, args.n, [&](int64_t begin, int64_t end) {
    const int64_t vectors_end = begin + vector_part<Element>(end - begin);
    if constexpr (sizeof(Element) < sizeof(double)) {
      Floats slope;
      for (int64_t i = begin; i < vectors_end; i += kLanes)
        store(active + i, activate(load(z + i), slope));
    }
    for (int64_t i = vectors_end; i < end; ++i) {
      Arithmetic<Element> slope;
      active[i] = narrow<Element>(gelu_of_one(activate, widen(z[i]), slope));
    }
  });
}

template <typename Element>
void gelu_backward_as(const GeluBackward& args, const Executor& executor) {
  const auto *z = static_cast<const Element*>(args.z),
             *d_active = static_cast<const Element*>(args.d_active);
  auto *active = static_cast<Element*>(args.active), *d_z = static_cast<Element*>(args.d_z);
  const auto& activate = gelu_of<Element>();
  run_pieces(executor, args.n, [&](int64_t begin, int64_t end) {
    const int64_t vectors_end = begin + vector_part<Element>(end - begin);
    if constexpr (sizeof(Element) < sizeof(double)) {
      for (int64_t i = begin; i < vectors_end; i += kLanes) {
        Floats slope;
        store(active + i, activate(load(z + i), slope));
        store(d_z + i, load(d_active + i) * slope);
      }
    }
    for (int64_t i = vectors_end; i < end; ++i) {
      Arithmetic<Element> slope;
      active[i] = narrow<Element>(gelu_of_one(activate, widen(z[i]), slope));
      d_z[i] = narrow<Element>(widen(d_active[i]) * slope);
    }
  });
}

inline void gelu_forward(const GeluForward& args, const Executor& executor) {
  with_element(args.dtype, [&](auto e) { gelu_forward_as<decltype(e)>(args, executor); });
}
inline void gelu_backward(const GeluBackward& args, const Executor& executor) {
  with_element(args.dtype, [&](auto e) { gelu_backward_as<decltype(e)>(args, executor); });
}

}  // namespace wgpt::cpu::WGPT_TARGET

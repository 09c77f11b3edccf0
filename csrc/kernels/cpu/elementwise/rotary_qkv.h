// rotary_qkv on the CPU. Formula and shapes: kernels/rotary_qkv.h.
#pragma once

#include "kernels/cpu/simd/rows.h"
#include "kernels/cpu/threads/tasks.h"
#include "kernels/rotary_qkv.h"

namespace wgpt::cpu::WGPT_TARGET {

constexpr int64_t kRotaryStepsPerTask = 64;

// out = (a cos - b sin, b cos + a sin) for the halves a, b of one head; kSign -1 rotates back.
template <int kSign, typename Element, typename Sum>
inline void rotate_head(const Element* in, const Sum* cos, const Sum* sin, int64_t half,
                        Element* out) {
  if constexpr (sizeof(Element) < sizeof(double)) {
    if (half % kLanes == 0) {
      const Floats direction = splat(kSign);
      for (int64_t i = 0; i < half; i += kLanes) {
        const Floats a = load(in + i), b = load(in + half + i), c = load(cos + i),
                     s = load(sin + i) * direction;
        store(out + i, a * c - b * s);
        store(out + half + i, b * c + a * s);
      }
      return;
    }
  }
  for (int64_t i = 0; i < half; ++i) {
    const Sum a = widen(in[i]), b = widen(in[half + i]), c = cos[i], s = sin[i] * kSign;
    out[i] = narrow<Element>(a * c - b * s);
    out[half + i] = narrow<Element>(b * c + a * s);
  }
}

// Calls body(step of all B T, cos row, sin row).
template <typename Sum, typename Body>
void for_each_step(const RotaryShape& shape, const void* cos, const void* sin,
                   const Executor& executor, Body&& body) {
  const int64_t n_steps = shape.batch * shape.steps, half = shape.head_dim / 2;
  run_tasks(executor, ceil_div(n_steps, kRotaryStepsPerTask), [&](int64_t task) {
    const int64_t begin = task * kRotaryStepsPerTask,
                  end = min_of(begin + kRotaryStepsPerTask, n_steps);
    for (int64_t step = begin; step < end; ++step) {
      const int64_t angle = step % shape.steps * half;
      body(step, static_cast<const Sum*>(cos) + angle, static_cast<const Sum*>(sin) + angle);
    }
  });
}

template <typename Element>
void rotary_qkv_forward_as(const RotaryForward& args, const Executor& executor) {
  using Sum = Arithmetic<Element>;
  const RotaryShape& shape = args.shape;
  const int64_t d = shape.head_dim, width = shape.heads * d;
  const auto body = [&](int64_t step, const Sum* cos, const Sum* sin) {
    const Element* in = static_cast<const Element*>(args.qkv) + step * 3 * width;
    Element *q = static_cast<Element*>(args.q) + step * width,
            *k = static_cast<Element*>(args.k) + step * width;
    for (int64_t c = 0; c < width; c += d) {
      rotate_head<1>(in + c, cos, sin, d / 2, q + c);
      rotate_head<1>(in + width + c, cos, sin, d / 2, k + c);
    }
    std::memcpy(static_cast<Element*>(args.v) + step * width, in + 2 * width,
                static_cast<size_t>(width) * sizeof(Element));
  };
  for_each_step<Sum>(shape, args.cos, args.sin, executor, body);
}

template <typename Element>
void rotary_qkv_backward_as(const RotaryBackward& args, const Executor& executor) {
  using Sum = Arithmetic<Element>;
  const RotaryShape& shape = args.shape;
  const int64_t d = shape.head_dim, width = shape.heads * d;
  const auto body = [&](int64_t step, const Sum* cos, const Sum* sin) {
    Element* out = static_cast<Element*>(args.d_qkv) + step * 3 * width;
    const Element *dq = static_cast<const Element*>(args.dq) + step * width,
                  *dk = static_cast<const Element*>(args.dk) + step * width;
    for (int64_t c = 0; c < width; c += d) {
      rotate_head<-1>(dq + c, cos, sin, d / 2, out + c);
      rotate_head<-1>(dk + c, cos, sin, d / 2, out + width + c);
    }
    std::memcpy(out + 2 * width, static_cast<const Element*>(args.dv) + step * width,
                static_cast<size_t>(width) * sizeof(Element));
  };
  for_each_step<Sum>(shape, args.cos, args.sin, executor, body);
}

inline void rotary_qkv_forward(const RotaryForward& args, const Executor& executor) {
  with_element(args.shape.dtype,
               [&](auto e) { rotary_qkv_forward_as<decltype(e)>(args, executor); });
}
inline void rotary_qkv_backward(const RotaryBackward& args, const Executor& executor) {
  with_element(args.shape.dtype,
               [&](auto e) { rotary_qkv_backward_as<decltype(e)>(args, executor); });
}

}  // namespace wgpt::cpu::WGPT_TARGET

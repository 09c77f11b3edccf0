// What a call asks for between scale q k^T and the softmax: softcap, then a bias or mask. Formula and shapes:
// kernels/flash_attention.h. Applied to scores in registers, a strip of keys at a time.
#pragma once

#include <math.h>

#include "kernels/cpu/attention/visibility.h"

namespace wgpt::cpu::WGPT_TARGET {

inline Floats magnitude(Floats x) { return max_or_second(x, splat(0.0f) - x); }

// Within two units in the last place: a polynomial (Cephes tanhf) below 0.625, else 1 - 2 / (e^2x + 1).
inline Floats tanh_of(Floats x) {
  const Floats size = magnitude(x), square = size * size, most = splat(40.0f);
  Floats y = fma(splat(-5.70498872745e-3f), square, splat(2.06390887954e-2f));
  y = fma(y, square, splat(-5.37397155531e-2f));
  y = fma(y, square, splat(1.33314422036e-1f));
  y = fma(y, square, splat(-3.33332819422e-1f));
  y = fma(y * square, size, size);
  const Floats power = exp2_of<true>(choose_above(size, most, most, size) * splat(2.0f * kLog2E));
  const Floats far = splat(1.0f) - splat(2.0f) / (power + splat(1.0f));
  y = choose_above(size, splat(0.625f), far, y);
  return choose_above(splat(0.0f), x, splat(0.0f) - y, y);
}

class ScoreTransform {
 public:
  // Of query head h of item b.
  ScoreTransform(const FlashAttentionShape& shape, const ScoreBias& bias, int64_t b, int64_t h)
      : bias_(bias),
        scale_(static_cast<float>(shape.scale)),
        softcap_(shape.softcap),
        offset_(b * bias.batch_stride + h * bias.head_stride),
        kv_steps_(shape.kv_steps) {}

  // Whether there is anything to do beyond the scale. The softmax then takes scores in nats.
  bool is_active() const { return bias_.data != nullptr || softcap_ > 0.0; }
  static bool is_active(const FlashAttentionShape& shape, const ScoreBias& bias) {
    return bias.data != nullptr || shape.softcap > 0.0;
  }

  // s = q k^T of query i and of keys from j on -> scores in nats. slope, all 1 before: their derivatives after
  // scale s.
  //
  // Not inlined: every kernel calls it, and copies in each of them were a third of the library.
  template <int kWidth>
  __attribute__((noinline)) void apply(int64_t i, int64_t j, Floats (&s)[kWidth],
                                       Floats (&slope)[kWidth]) const {
    WGPT_UNROLL for (int v = 0; v < kWidth; ++v) s[v] = s[v] * splat(scale_);
    if (softcap_ > 0.0) {
      const auto softcap = static_cast<float>(softcap_);
      WGPT_UNROLL for (int v = 0; v < kWidth; ++v) {
        const Floats t = tanh_of(s[v] * splat(1.0f / softcap));
        s[v] = t * splat(softcap);
        slope[v] = splat(1.0f) - t * t;
      }
    }
    if (bias_.data != nullptr) add_bias(i, j, s);
  }

  template <int kWidth>
  WGPT_INLINE void apply(int64_t i, int64_t j, Floats (&s)[kWidth]) const {
    Floats slope[kWidth];
    apply(i, j, s, slope);
  }

  // The same for one score, in float64.
  double apply(int64_t i, int64_t j, double scaled, double* slope) const {
    *slope = 1.0;
    if (softcap_ > 0.0) {
      const double t = tanh(scaled / softcap_);
      scaled = t * softcap_;
      *slope = 1.0 - t * t;
    }
    return bias_.data == nullptr ? scaled : scaled + bias_at(offset_of(i, j));
  }

 private:
  int64_t offset_of(int64_t i, int64_t j) const {
    return offset_ + i * bias_.query_stride + j * bias_.key_stride;
  }

  template <int kWidth>
  WGPT_INLINE void add_bias(int64_t i, int64_t j, Floats (&s)[kWidth]) const {
    const int64_t at = offset_of(i, j);
    if (bias_.key_stride == 1 && j + kWidth * kLanes <= kv_steps_) {
      if (bias_.is_mask) return add_row(static_cast<const uint8_t*>(bias_.data) + at, s);
      if (bias_.dtype == DType::kFloat32)
        return add_row(static_cast<const float*>(bias_.data) + at, s);
      if (bias_.dtype == DType::kBFloat16)
        return add_row(static_cast<const BFloat16*>(bias_.data) + at, s);
      return add_row(static_cast<const Float16*>(bias_.data) + at, s);
    }
    alignas(64) float row[kWidth * kLanes] = {};  // 0 past the last key
    const int64_t n = min_of<int64_t>(kWidth * kLanes, kv_steps_ - j);
    for (int64_t key = 0; key < n; ++key)
      row[key] = static_cast<float>(bias_at(at + key * bias_.key_stride));
    add_row(row, s);
  }

  template <int kWidth, typename Element>
  static WGPT_INLINE void add_row(const Element* row, Floats (&s)[kWidth]) {
    WGPT_UNROLL for (int v = 0; v < kWidth; ++v) s[v] = s[v] + load_bias(row + v * kLanes);
  }

  template <typename Element>
  static WGPT_INLINE Floats load_bias(const Element* p) {
    return load(p);
  }
  static WGPT_INLINE Floats load_bias(const uint8_t* bits) {
    return choose_by_bytes(bits, splat(0.0f), splat(-INFINITY));
  }

  double bias_at(int64_t at) const {
    if (bias_.is_mask) return static_cast<const uint8_t*>(bias_.data)[at] != 0 ? 0.0 : -INFINITY;
    double value = 0.0;
    with_element(bias_.dtype, [&](auto element) {
      value = double{widen(static_cast<const decltype(element)*>(bias_.data)[at])};
    });
    return value;
  }

  ScoreBias bias_;
  float scale_;
  double softcap_;
  int64_t offset_, kv_steps_;
};

}  // namespace wgpt::cpu::WGPT_TARGET

// The GELU, x Phi(x), and its slope: in float32 vectors and in double, and by tables for bfloat16.
//
//   Phi(-a) = exp(-a^2 / 2) t Q(t),  t = 1 / (1 + 0.36 a),  a = |x|,  Phi(x) = 1 - Phi(-x)
//   gelu'(x) = Phi(x) + x exp(-x^2 / 2) / sqrt(2 pi)
//
// Q: degree 8, minimax in relative error (7e-8) for a in [0, 14].
//
// Measured error of x Phi(x) on [-12, 12]: 4e-7 absolute, against 1.1e-6 for torch's.
#pragma once

#include <math.h>

#include "kernels/cpu/simd/vec.h"

namespace wgpt::cpu::WGPT_TARGET {

struct GaussianPair {
  Floats cdf, bell;  // Phi(x), exp(-x^2 / 2)
};

inline GaussianPair gaussian(Floats x) {
  const Floats magnitude = max_or_second(x, splat(0.0f) - x);
  const Floats bell = exp2_of<true>(x * x * splat(-0.72134752044448170f));
  const Floats t = reciprocal(fma(splat(0.36f), magnitude, splat(1.0f)));
  Floats q = fma(splat(-0x1.e5d702p-6f), t, splat(0x1.176d5cp-3f));
  q = fma(q, t, splat(-0x1.bc21a0p-3f));
  q = fma(q, t, splat(0x1.96c25ap-4f));
  q = fma(q, t, splat(0x1.5e2b7cp-8f));
  q = fma(q, t, splat(0x1.7f458cp-4f));
  q = fma(q, t, splat(0x1.fe7ff4p-4f));
  q = fma(q, t, splat(0x1.261660p-3f));
  q = fma(q, t, splat(0x1.262376p-3f));
  const Floats tail = q * t * bell;  // Phi(-|x|)
  return {choose_above(x, splat(0.0f), splat(1.0f) - tail, tail), bell};
}

// gelu(x), and gelu'(x) in slope.
inline Floats gelu(Floats x, Floats& slope) {
  const GaussianPair g = gaussian(x);
  slope = fma(x * splat(0.39894228040143268f), g.bell, g.cdf);
  return x * g.cdf;
}

#if defined(__AVX512F__)
// Both for what becomes a bfloat16, by tables that one instruction looks up: with a = |x|, Phi(-a) and
// gelu'(-a) are parabolas on each of 31 pieces of [0, 5] and zero above. Measured error of gelu 8e-6, of
// its slope 4e-5, where a bfloat16 is rounded by up to 2e-3 of its value.
class GeluTable {
 public:
  GeluTable();
  Floats operator()(Floats x, Floats& slope) const {
    const Floats magnitude = max_or_second(x, splat(0.0f) - x);
    const Floats a = _mm512_min_ps(splat((kPieces - 1) * kPiece), magnitude);  // NaN stays
    // Whole pieces in the lowest bits, which are those that a table is indexed by.
    const __m512i piece = _mm512_castps_si512(fma(a, splat(1.0f / kPiece), splat(12582912.0f)));
    const __mmask16 positive = _mm512_cmp_ps_mask(x, splat(0.0f), _CMP_GT_OQ);
    const Floats tail = parabola(tail_, piece, a), tail_slope = parabola(slope_, piece, a);
    slope = _mm512_mask_sub_ps(tail_slope, positive, splat(1.0f), tail_slope);
    return x * _mm512_mask_sub_ps(tail, positive, splat(1.0f), tail);
  }

 private:
  static constexpr int kPieces = 32;  // around the multiples of kPiece
  static constexpr float kPiece = 5.0f / (kPieces - 1.5f);
  using Parabolas = float[3][kPieces];

  static Floats parabola(const Parabolas& table, __m512i piece, Floats a) {
    Floats c[3];
    for (int i = 0; i < 3; ++i)
      c[i] = _mm512_permutex2var_ps(load(table[i]), piece, load(table[i] + kLanes));
    return fma(fma(c[2], a, c[1]), a, c[0]);
  }
  template <typename Function>
  static void fit(Function&& function, Parabolas& table);

  alignas(64) Parabolas tail_, slope_;
};
#endif

inline double gaussian_cdf(double x) { return 0.5 * erfc(-0.70710678118654752 * x); }
inline double gelu(double x) { return x * gaussian_cdf(x); }
inline double gelu_slope(double x) {
  return gaussian_cdf(x) + x * 0.39894228040143268 * exp(-0.5 * x * x);
}

#if defined(__AVX512F__)
// Parabolas through three points of each piece where the error of the best one changes sign.
template <typename Function>
void GeluTable::fit(Function&& function, Parabolas& table) {
  for (int i = 0; i < 3; ++i) table[i][kPieces - 1] = 0.0f;
  for (int piece = 0; piece < kPieces - 1; ++piece) {
    const double low = piece == 0 ? 0.0 : (piece - 0.5) * kPiece, high = (piece + 0.5) * kPiece;
    double x[3], y[3];
    for (int i = 0; i < 3; ++i) {
      constexpr double kNodes[3] = {-0.86602540378443865, 0.0, 0.86602540378443865};
      x[i] = 0.5 * (low + high + (high - low) * kNodes[i]);
      y[i] = function(x[i]);
    }
    const double first = (y[1] - y[0]) / (x[1] - x[0]), second = (y[2] - y[1]) / (x[2] - x[1]),
                 square = (second - first) / (x[2] - x[0]);
    table[0][piece] = static_cast<float>(y[0] - first * x[0] + square * x[0] * x[1]);
    table[1][piece] = static_cast<float>(first - square * (x[0] + x[1]));
    table[2][piece] = static_cast<float>(square);
  }
}
inline GeluTable::GeluTable() {
  fit([](double a) { return gaussian_cdf(-a); }, tail_);
  fit([](double a) { return gelu_slope(-a); }, slope_);
}
#endif

inline double gelu(double x, double& slope) {
  slope = gelu_slope(x);
  return gelu(x);
}

// The GELU for elements of a type.
struct ExactGelu {
  Floats operator()(Floats x, Floats& slope) const { return gelu(x, slope); }
  double operator()(double x, double& slope) const { return gelu(x, slope); }
};
template <typename Element>
struct GeluOf {
  using Type = ExactGelu;
};
#if defined(__AVX512F__)
template <>
struct GeluOf<BFloat16> {
  using Type = GeluTable;
};
#endif

// One number, with the bits that it has among others.
template <typename Gelu>
inline float gelu_of_one(const Gelu& gelu, float x, float& slope) {
  Floats slopes;
  const float active = first_lane(gelu(splat(x), slopes));
  slope = first_lane(slopes);
  return active;
}
template <typename Gelu>
inline double gelu_of_one(const Gelu& gelu, double x, double& slope) {
  return gelu(x, slope);
}

// One for all calls.
template <typename Element>
const typename GeluOf<Element>::Type& gelu_of() {
  static const typename GeluOf<Element>::Type gelu;
  return gelu;
}

}  // namespace wgpt::cpu::WGPT_TARGET

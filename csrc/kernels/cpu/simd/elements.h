// Element types as the kernels see them: storage formats, their arithmetic type, and scalar
// conversions.
//
// Included once per target inside its own namespace (WGPT_TARGET), so that no function compiled
// with one target's instructions can be linked into another's code.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels/common.h"

namespace wgpt::cpu::WGPT_TARGET {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

// The type sums are kept in.
template <typename Element>
struct ArithmeticOf {
  using Type = float;
};
template <>
struct ArithmeticOf<double> {
  using Type = double;
};
template <typename Element>
using Arithmetic = typename ArithmeticOf<Element>::Type;

template <typename To, typename From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <typename T>
inline T min_of(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
inline T max_of(T a, T b) {
  return a < b ? b : a;
}
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

inline void clear_floats(float* out, int64_t n) {
  std::memset(out, 0, static_cast<size_t>(n) * sizeof(float));
}

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(BFloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

// Half to float without tables: normal numbers by moving the exponent's bias, subnormals by a float
// subtraction.
inline float widen(Float16 x) {
  const uint32_t magnitude = x.bits & 0x7fffu, sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  uint32_t normal = (magnitude << 13) + (112u << 23);
  if (magnitude >= 0x7c00u) normal += 112u << 23;  // infinity and NaN keep the largest exponent
  const float subnormal =
      bit_cast<float>((magnitude << 13) + (113u << 23)) - bit_cast<float>(113u << 23);
  return bit_cast<float>((magnitude < 0x400u ? bit_cast<uint32_t>(subnormal) : normal) | sign);
}

template <typename Element>
Element narrow(Arithmetic<Element> x);

template <>
inline float narrow<float>(float x) {
  return x;
}
template <>
inline double narrow<double>(double x) {
  return x;
}
// To nearest, ties to even; NaN stays NaN.
template <>
inline BFloat16 narrow<BFloat16>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>(x == x ? rounded : (bits >> 16) | 0x40u)};
}
template <>
inline Float16 narrow<Float16>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x), sign = (bits >> 16) & 0x8000u,
                 magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // rounds past 65504
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: the float adder rounds
    half = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(half | sign)};
}

// Calls body(Element{}) for the C++ type that stands behind dtype.
template <typename Body>
inline void with_element(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(float{});
    case DType::kBFloat16:
      return body(BFloat16{});
    case DType::kFloat16:
      return body(Float16{});
    case DType::kFloat64:
      return body(double{});
  }
}

}  // namespace wgpt::cpu::WGPT_TARGET

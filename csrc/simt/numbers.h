// Conversions between float and the two 16-bit formats, round to nearest even, as the hardware does them.
#pragma once

#include <cstdint>
#include <cstring>

namespace simt {

inline uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float bits_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline float bf16_to_float(uint16_t x) { return bits_float(static_cast<uint32_t>(x) << 16); }

inline uint16_t float_to_bf16(float x) {
  const uint32_t bits = float_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;  // the one NaN that cvt.rn.bf16 writes
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

inline float half_to_float(uint16_t x) {
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000) << 16;
  const uint32_t rest = static_cast<uint32_t>(x & 0x7fff) << 13;
  if ((x & 0x7c00) == 0x7c00) return bits_float(sign | rest | 0x7f800000u);
  // Multiplying by 2^112 moves the exponent's bias and makes subnormal halves normal floats.
  const float magnitude = bits_float(rest) * 5.192296858534827628530496329220096e33f;
  return bits_float(sign | float_bits(magnitude));
}

inline uint16_t float_to_half(float x) {
  const uint32_t bits = float_bits(x);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  uint32_t rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return 0x7fff;
  if (rest >= 0x477ff000u) return sign | 0x7c00;  // 65520 and above round to infinity
  if (rest < 0x38800000u) {                       // a subnormal half: let the float adder round it
    const float shifted = bits_float(rest) + 0.5f;
    return static_cast<uint16_t>(sign | (float_bits(shifted) - 0x3f000000u));
  }
  rest += 0xc8000fffu + (rest >> 13 & 1);  // bias 127 -> 15, round to nearest even
  return static_cast<uint16_t>(sign | rest >> 13);
}

// tf32 keeps 10 bits of mantissa; cvt.rna.tf32 rounds to nearest, ties away from zero.
inline float float_to_tf32(float x) {
  const uint32_t bits = float_bits(x);
  if ((bits & 0x7f800000u) == 0x7f800000u) return x;
  return bits_float((bits + 0x1000u) & 0xffffe000u);
}

}  // namespace simt

// The arithmetic of a tensor core, bit for bit as the published models of A100, L40S, H100, H200
// and B200 have it (Khattak and Mikaitis, Accurate Models of NVIDIA Tensor Cores, arXiv
// 2512.07004). The k products of an element are added in blocks, one after another; the sum of one
// block is a term of the next:
//
//   products   exact; the exponent of a product is the sum of its factors', so its significand
//              lies in [1, 4)
//   alignment  of the block's products and the sum so far to their largest exponent; what lies
//              beyond 2^-23 of it and the extra bits is cut from each
//   sum        exact, then cut to float32 toward zero; subnormals are kept everywhere
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "simt/numbers.h"

namespace simt {

struct TensorCore {
  int extra_bits;       // kept beyond those of float32 while adding
  int lowest_exponent;  // terms are aligned to this one at least
};
constexpr TensorCore kAmpereCore = {1, -132};  // sm_80 to sm_89; 8 16-bit products a block, 4 tf32
constexpr TensorCore kHopperCore = {2, -133};  // sm_90 to sm_120; 16 and 8

// Stand-ins for the exponents of what has none; a sum of two still says what the product is.
constexpr int kZeroExponent = -2048;      // products with a factor 0 take no part in alignment
constexpr int kNotFiniteExponent = 8192;  // infinity or NaN

inline int16_t exponent_of(float x, int lowest) {
  const int exponent = static_cast<int>(float_bits(x) >> 23 & 0xff) - 127;
  if (exponent == 128) return kNotFiniteExponent;
  if (x == 0.f) return kZeroExponent;
  return static_cast<int16_t>(exponent > lowest ? exponent : lowest);
}

inline double power_of_two(int exponent) {
  const uint64_t bits = static_cast<uint64_t>(exponent + 1023) << 52;
  double x;
  std::memcpy(&x, &bits, 8);
  return x;
}

// The place of the last bit that is kept of terms whose largest exponent is this.
inline int last_place_of(const TensorCore& core, int largest) {
  if (largest < kZeroExponent / 2) return 0;  // nothing but zeros
  return (largest > core.lowest_exponent ? largest : core.lowest_exponent) - 23 - core.extra_bits;
}

// sum 2^last_place, cut to float32 toward zero.
inline float cut_to_float(int64_t sum, int last_place) {
  if (sum == 0) return 0.f;
  const uint64_t magnitude = static_cast<uint64_t>(sum < 0 ? -sum : sum);
  int drop = 64 - __builtin_clzll(magnitude) - 24;
  if (drop < -149 - last_place) drop = -149 - last_place;  // 2^-149 is the smallest subnormal
  const uint64_t kept = drop <= 0 ? magnitude : magnitude >> drop << drop;
  const double value = static_cast<double>(kept) * power_of_two(last_place);
  return static_cast<float>(sum < 0 ? -value : value);  // exact, or infinite from 2^128 on
}

// c + a b for kBlock products of any size; b is a column of B.
template <int kBlock>
float add_products(const TensorCore& core, const float* a, const float (*b)[8], int n, int largest,
                   float c) {
  if (largest >= kNotFiniteExponent / 2) {  // as IEEE; the one NaN that comes out is this
    double sum = c;
    for (int k = 0; k < kBlock; ++k) sum += static_cast<double>(a[k]) * b[k][n];
    return std::isnan(sum) ? bits_float(0x7fffffffu) : static_cast<float>(sum);
  }
  const int last_place = last_place_of(core, largest);
  const double scale = power_of_two(-last_place);
  int64_t sum = static_cast<int64_t>(c * scale);
  for (int k = 0; k < kBlock; ++k)
    sum += static_cast<int64_t>(static_cast<double>(a[k]) * b[k][n] * scale);
  return cut_to_float(sum, last_place);
}

// The same for a row of eight elements whose scaled terms float holds exactly, or so small that
// they are cut.
template <int kBlock>
void add_usual_products(const TensorCore& core, const float* a, const float (*b)[8],
                        const int16_t (&largest)[8], float (&c)[8]) {
  float scale[8];
  int last_place[8];
  int32_t low[8], high[8] = {};  // half of the products each, or 32 bits would not do
  for (int n = 0; n < 8; ++n) {
    last_place[n] = last_place_of(core, largest[n]);
    scale[n] = static_cast<float>(power_of_two(-last_place[n]));
    low[n] = static_cast<int32_t>(c[n] * scale[n]);
  }
  for (int k = 0; k < kBlock / 2; ++k) {
    for (int n = 0; n < 8; ++n) low[n] += static_cast<int32_t>(a[k] * b[k][n] * scale[n]);
  }
  for (int k = kBlock / 2; k < kBlock; ++k) {
    for (int n = 0; n < 8; ++n) high[n] += static_cast<int32_t>(a[k] * b[k][n] * scale[n]);
  }
  for (int n = 0; n < 8; ++n)
    c[n] = cut_to_float(static_cast<int64_t>(low[n]) + high[n], last_place[n]);
}

// c += a b in blocks of kBlock; `lowest` is the exponent of the smallest normal number of the
// format of a and b.
template <int kK, int kBlock>
void multiply_add(const TensorCore& core, const float (&a)[16][kK], const float (&b)[kK][8],
                  int lowest, float (&c)[16][8]) {
  int16_t b_exponent[kK][8];
  for (int k = 0; k < kK; ++k) {
    for (int n = 0; n < 8; ++n) b_exponent[k][n] = exponent_of(b[k][n], lowest);
  }
  for (int m = 0; m < 16; ++m) {
    for (int k0 = 0; k0 < kK; k0 += kBlock) {
      int16_t largest[8];
      for (int n = 0; n < 8; ++n) largest[n] = exponent_of(c[m][n], -126);
      for (int k = k0; k < k0 + kBlock; ++k) {
        const int16_t a_exponent = exponent_of(a[m][k], lowest);
        for (int n = 0; n < 8; ++n) {
          const auto product = static_cast<int16_t>(a_exponent + b_exponent[k][n]);
          largest[n] = product > largest[n] ? product : largest[n];
        }
      }
      bool usual = true;
      for (int n = 0; n < 8; ++n)
        usual &= largest[n] < kZeroExponent / 2 || (largest[n] >= -100 && largest[n] <= 100);
      if (usual) {
        add_usual_products<kBlock>(core, a[m] + k0, b + k0, largest, c[m]);
      } else {
        for (int n = 0; n < 8; ++n)
          c[m][n] = add_products<kBlock>(core, a[m] + k0, b + k0, n, largest[n], c[m][n]);
      }
    }
  }
}

}  // namespace simt

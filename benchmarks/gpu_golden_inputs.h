// What the probes of gpu_golden.cuh are asked: two rounds of random numbers each, and for mma a
// third whose 16 rows tell the parameters of the tensor core's arithmetic
// (csrc/simt/tensor_core.h). Host code.
#pragma once

#include <cmath>

#include "gpu_golden.cuh"
#include "simt/numbers.h"

namespace wgpt::cuda::golden {

inline bool is_mma(int id) { return id == kMmaBf16 || id == kMmaHalf || id == kMmaTf32; }

constexpr int kRandomRounds = 2;
inline int rounds_of(int id) { return kRandomRounds + (is_mma(id) ? 1 : 0); }

// ---- random numbers -----------------------------------------------------------------------------

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint32_t word() {
    state_ = state_ * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<uint32_t>(state_ >> 32);
  }
  // Numbers that neither overflow a half nor vanish in it: sign, exponent -7..8, random mantissa.
  uint32_t float32() {
    const uint32_t bits = word();
    return (bits & 0x807fffffu) | (120 + (bits >> 24) % 16) << 23;
  }
  uint32_t bf16() { return float32() >> 16; }
  uint32_t half() {
    const uint32_t bits = word();
    return (bits & 0x83ffu) | (8 + (bits >> 16) % 12) << 10;
  }

 private:
  uint64_t state_;
};

inline uint32_t random_input(int id, int word, Random& random) {
  switch (id) {
    case kMmaBf16:
      return word < 6 ? random.bf16() | random.bf16() << 16 : random.float32();
    case kMmaHalf:
      return word < 6 ? random.half() | random.half() << 16 : random.float32();
    case kFromHalf:
      return random.word() & 0xffff;
    case kMmaTf32:
    case kPackBf16:
    case kPackHalf:
    case kExp2:
      return random.float32();
    case kCopyAsync:
      return word == 4 ? random.word() & 1 : random.word();
    default:
      return random.word();
  }
}

// ---- rows that tell how an mma adds -------------------------------------------------------------

// Row m of A and C is one question, column n of B (and C) a factor of all its terms. kSum is a sum
// so far, kPlace the last place of its float32; the products are a kB = such numbers, for the
// factor 1.
constexpr float kSum = 0x1p20f, kPlace = 0x1p-3f, kB = 0x1p6f;
constexpr float kFactor[8] = {1.f, -1.f, 2.f, -2.f, 1.5f, -1.5f, 0.5f, 255.f / 128};

inline float row_c(int m) {
  switch (m) {
    case 6:   // order of blocks
    case 9:   // exponent of a product
    case 10:  // the same
    case 12:  // subnormal factor
    case 14:  // infinity
    case 15:  // infinity - infinity
      return 0.f;
    case 11:  // carries
      return kSum / 2;
    case 13:  // subnormal sum
      return 0x3p-149f;
    default:
      return kSum;
  }
}

// The product that row m adds at k of n_k, for the factor 1.
inline float row_product(int m, int k, int n_k) {
  const bool first = k == 0;
  switch (m) {
    case 0:  // rounded, or cut?
      return first ? 1.5f * kPlace : 0.f;
    case 1:  // one extra bit?
      return k < 2 ? kPlace / 2 : 0.f;
    case 2:  // two?
      return k < 4 ? kPlace / 4 : 0.f;
    case 3:  // three?
      return kPlace / 8;
    case 4:  // are the first half of the products added at once?
      return first || k == n_k / 2 - 1 ? kPlace / 2 : 0.f;
    case 5:  // and both halves?
      return first || k == n_k / 2 ? kPlace / 2 : 0.f;
    case 6:  // if not, is the first half the first?
      return first ? 2 * kSum : k == 1 ? kPlace : k == n_k / 2 ? -2 * kSum : 0.f;
    case 7:  // are negative terms cut toward zero?
      return first ? -kPlace / 4 : 0.f;
    case 8:  // is what cancels normalised before the rest is added?
      return first ? -kSum : k == 1 ? kPlace / 4 : 0.f;
    case 9:  // is 1.5 1.5 = 2.25 aligned as 2.25 2^0? (the column of factor 1.5)
      return first ? 1.5f * kSum : k < 4 ? kPlace / 2 : 0.f;
    case 10:  // the same, for one extra bit
      return first ? 1.5f * kSum : k < 4 ? kPlace : 0.f;
    case 11:  // are there enough carry bits? (most in the last column)
      return 255.f / 256 * kSum;
    default:
      return 0.f;
  }
}

inline float row_a(int id, int m, int k, int n_k) {
  if (m == 12 && k == 0)  // the format's smallest subnormal number
    return id == kMmaBf16 ? 0x1p-133f : id == kMmaHalf ? 0x1p-24f : 0x1p-136f;
  if (m == 14 && k == 0) return INFINITY;
  if (m == 15 && k < 2) return k == 0 ? INFINITY : -INFINITY;
  return row_product(m, k, n_k) / kB;
}

inline uint32_t bits_of(int id, float x) {
  return id == kMmaBf16   ? simt::float_to_bf16(x)
         : id == kMmaHalf ? simt::float_to_half(x)
                          : simt::float_bits(x);
}

// A word of a lane's fragments, as csrc/simt/warp_ops.cpp draws them.
inline uint32_t row_input(int id, int lane, int word) {
  const int g = lane / 4, t = lane % 4;
  const bool pairs = id != kMmaTf32;
  const int n_k = pairs ? 16 : 8;
  const auto b = [&](int n) { return bits_of(id, kFactor[n] * kB); };
  if (word < 4) {
    const int m = g + word % 2 * 8;
    if (!pairs) return bits_of(id, row_a(id, m, t + word / 2 * 4, n_k));
    const int k = 2 * t + word / 2 * 8;
    return bits_of(id, row_a(id, m, k, n_k)) | bits_of(id, row_a(id, m, k + 1, n_k)) << 16;
  }
  if (word < 6) return pairs ? b(g) | b(g) << 16 : b(g);
  const int i = word - 6, m = g + i / 2 * 8, n = 2 * t + i % 2;
  return simt::float_bits(row_c(m) * kFactor[n]);
}

// The 32 in_words words of a round.
inline void write_input(int id, int round, uint32_t* in) {
  Random random(1 + static_cast<uint64_t>(id) * kRandomRounds + round);
  const int n_words = kProbe[id].in_words;
  for (int i = 0; i < 32 * n_words; ++i) {
    in[i] = round < kRandomRounds ? random_input(id, i % n_words, random)
                                  : row_input(id, i / n_words, i % n_words);
  }
}

}  // namespace wgpt::cuda::golden

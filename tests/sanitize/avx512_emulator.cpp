// What avx512_emulator.h declares: all that only computes.
#include "avx512_emulator.h"

#include <cmath>

namespace wgpt {
namespace emulator {
namespace {

using Words = uint32_t __attribute__((vector_size(64)));
using Integers = int32_t __attribute__((vector_size(64)));
using Shorts = uint16_t __attribute__((vector_size(64)));
using Bytes = int8_t __attribute__((vector_size(16)));
using HalfShorts = uint16_t __attribute__((vector_size(32)));

inline Words words(__m512i x) { return reinterpret_cast<Words>(x); }
inline Words words(__m512 x) { return reinterpret_cast<Words>(x); }
inline __m512i integers(Words x) { return reinterpret_cast<__m512i>(x); }
inline __m512 floats(Words x) { return reinterpret_cast<__m512>(x); }

template <typename Lane>  // lane(i): of the result, for i in [0, 16)
inline __m512 from_lanes(Lane&& lane) {
  __m512 x{};
  for (int i = 0; i < 16; ++i) x[i] = lane(i);
  return x;
}
template <typename Lane>
inline __m512i from_words(Lane&& lane) {
  Words x{};
  for (int i = 0; i < 16; ++i) x[i] = lane(i);
  return integers(x);
}
template <typename Bit>
inline __mmask16 mask_of(Bit&& bit) {
  unsigned mask = 0;
  for (int i = 0; i < 16; ++i) mask |= bit(i) ? 1u << i : 0u;
  return static_cast<__mmask16>(mask);
}

// By halves, as AVX2 does it.
union Halves {
  __m512 whole;
  __m256 half[2];
};
template <typename Half>
inline __m512 by_halves(__m512 a, __m512 b, Half&& half) {
  const Halves x{a}, y{b};
  Halves z{};
  for (int i = 0; i < 2; ++i) z.half[i] = half(x.half[i], y.half[i]);
  return z.whole;
}
inline __m512 fused(__m512 a, __m512 b, __m512 c) {
  const Halves x{a}, y{b};
  Halves z{c};
  for (int i = 0; i < 2; ++i) z.half[i] = _mm256_fmadd_ps(x.half[i], y.half[i], z.half[i]);
  return z.whole;
}

// What bfloat16 multiplication and conversion do with subnormal numbers, whatever MXCSR says.
inline Words flushed(Words x) { return (x & 0x7f800000u) == 0 ? x & 0x80000000u : x; }
inline __m512 flushed(__m512 x) { return floats(flushed(words(x))); }

// Both numbers of every pair.
inline __m512 low_of(Words pairs) { return floats(flushed(pairs << 16)); }
inline __m512 high_of(Words pairs) { return floats(flushed(pairs & 0xffff0000u)); }

inline uint16_t bfloat16_of(float x) {
  uint32_t bits = read<uint32_t>(&x);
  if (std::isnan(x)) return static_cast<uint16_t>(bits >> 16 | 0x40u);
  if ((bits & 0x7f800000u) == 0) return static_cast<uint16_t>(bits >> 16 & 0x8000u);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

}  // namespace

Tiles& tiles() {
  static thread_local Tiles tiles;
  return tiles;
}

}  // namespace emulator

using namespace emulator;

// Casts and constants.
__m512 _mm512_set1_ps(float x) {
  return from_lanes([&](int) { return x; });
}
__m512i _mm512_set1_epi32(int x) {
  return from_words([&](int) { return static_cast<uint32_t>(x); });
}
__m512i _mm512_set1_epi16(short x) {
  return reinterpret_cast<__m512i>(Shorts{} + static_cast<uint16_t>(x));
}
__m256i _mm512_extracti64x4_epi64(__m512i x, int half) {
  assert(half == 0 || half == 1);
  return __m256i{x[half * 4], x[half * 4 + 1], x[half * 4 + 2], x[half * 4 + 3]};
}
__m256i _mm512_castsi512_si256(__m512i x) { return _mm512_extracti64x4_epi64(x, 0); }

// Floats.
__m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) { return fused(a, b, c); }
__m512 _mm512_fnmadd_ps(__m512 a, __m512 b, __m512 c) { return fused(-a, b, c); }
__m512 _mm512_max_ps(__m512 a, __m512 b) {  // b where either is NaN
  return by_halves(a, b, [](__m256 x, __m256 y) { return _mm256_max_ps(x, y); });
}
__m512 _mm512_min_ps(__m512 a, __m512 b) {
  return by_halves(a, b, [](__m256 x, __m256 y) { return _mm256_min_ps(x, y); });
}
__m512 _mm512_mask_sub_ps(__m512 otherwise, __mmask16 mask, __m512 a, __m512 b) {
  return from_lanes([&](int i) { return has(mask, i) ? a[i] - b[i] : otherwise[i]; });
}
__m512 _mm512_mask_blend_ps(__mmask16 mask, __m512 a, __m512 b) {
  return from_lanes([&](int i) { return has(mask, i) ? b[i] : a[i]; });
}
__mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int predicate) {
  assert(predicate == _CMP_GT_OQ || predicate == _CMP_UNORD_Q);
  return mask_of([&](int i) {
    return predicate == _CMP_GT_OQ ? a[i] > b[i] : std::isnan(a[i]) || std::isnan(b[i]);
  });
}
__m512 _mm512_rcp14_ps(__m512 x) {
  const __m512 exact = 1.0f / x;
  return floats(words(exact) & 0xfffffe00u);  // 14 bits of fraction
}
// x less its nearest integer.
__m512 _mm512_reduce_ps(__m512 x, int control) {
  assert(control == 0);
  return from_lanes([&](int i) { return std::isinf(x[i]) ? 0.0f : x[i] - std::nearbyint(x[i]); });
}
// a 2^floor(b)
__m512 _mm512_scalef_ps(__m512 a, __m512 b) {
  return from_lanes([&](int i) {
    if (std::isnan(b[i])) return b[i];
    if (std::isinf(b[i])) return a[i] * (b[i] > 0 ? b[i] : 0.0f);
    const float n = std::fmax(-300.0f, std::fmin(300.0f, std::floor(b[i])));  // floats end before
    const uint64_t power = static_cast<uint64_t>(1023 + static_cast<int>(n)) << 52;
    return static_cast<float>(a[i] * read<double>(&power));
  });
}
// In the order of GCC's.
template <typename Reduce>
inline float reduce_lanes(__m512 x, Reduce&& reduce) {
  for (int n = 8; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) x[i] = reduce(x[i + n], x[i]);
  return x[0];
}
float _mm512_reduce_add_ps(__m512 x) {
  return reduce_lanes(x, [](float a, float b) { return a + b; });
}
float _mm512_reduce_max_ps(__m512 x) {
  return reduce_lanes(x, [](float a, float b) { return a > b ? a : b; });
}

// Integers.
__m512i _mm512_add_epi32(__m512i a, __m512i b) { return integers(words(a) + words(b)); }
__m512i _mm512_add_epi16(__m512i a, __m512i b) {
  return reinterpret_cast<__m512i>(reinterpret_cast<Shorts>(a) + reinterpret_cast<Shorts>(b));
}
__m512i _mm512_and_si512(__m512i a, __m512i b) { return a & b; }
__m512i _mm512_or_si512(__m512i a, __m512i b) { return a | b; }
__m512i _mm512_mask_or_epi32(__m512i otherwise, __mmask16 mask, __m512i a, __m512i b) {
  return _mm512_castps_si512(_mm512_mask_blend_ps(mask, _mm512_castsi512_ps(otherwise),
                                                  _mm512_castsi512_ps(_mm512_or_si512(a, b))));
}
__m512i _mm512_slli_epi32(__m512i x, unsigned n) {
  return n > 31 ? __m512i{} : integers(words(x) << n);
}
__m512i _mm512_srli_epi32(__m512i x, unsigned n) {
  return n > 31 ? __m512i{} : integers(words(x) >> n);
}
// Bit 4 a + 2 b + c of the table.
__m512i _mm512_ternarylogic_epi32(__m512i a, __m512i b, __m512i c, int table) {
  __m512i x{};
  for (int i = 0; i < 8; ++i) {
    if ((table >> i & 1) != 0) x |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  }
  return x;
}
__mmask16 _mm512_cmpge_epi32_mask(__m512i a, __m512i b) {
  const auto x = reinterpret_cast<Integers>(a), y = reinterpret_cast<Integers>(b);
  return mask_of([&](int i) { return x[i] >= y[i]; });
}
__mmask16 _mm512_mask_cmplt_epi32_mask(__mmask16 mask, __m512i a, __m512i b) {
  return static_cast<__mmask16>(mask & ~_mm512_cmpge_epi32_mask(a, b));
}

// Other types.
__m512i _mm512_cvtepi8_epi32(__m128i x) {
  const auto from = reinterpret_cast<Bytes>(x);
  return from_words([&](int i) { return static_cast<uint32_t>(int32_t{from[i]}); });
}
__m512 _mm512_cvtepi32_ps(__m512i x) {
  const auto from = reinterpret_cast<Integers>(x);
  return from_lanes([&](int i) { return static_cast<float>(from[i]); });
}
__m512i _mm512_cvtepu16_epi32(__m256i x) {
  const auto from = reinterpret_cast<HalfShorts>(x);
  return from_words([&](int i) { return from[i]; });
}
__m256i _mm512_cvtepi32_epi16(__m512i x) {
  HalfShorts to{};
  for (int i = 0; i < 16; ++i) to[i] = static_cast<uint16_t>(words(x)[i]);
  return reinterpret_cast<__m256i>(to);
}
__m512 _mm512_cvtph_ps(__m256i x) {
  Halves to{};
  to.half[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(x));
  to.half[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(x, 1));
  return to.whole;
}
__m256i _mm512_cvtps_ph(__m512 x, int rounding) {
  assert(rounding == _MM_FROUND_TO_NEAREST_INT);
  const Halves from{x};
  return _mm256_set_m128i(_mm256_cvtps_ph(from.half[1], _MM_FROUND_TO_NEAREST_INT),
                          _mm256_cvtps_ph(from.half[0], _MM_FROUND_TO_NEAREST_INT));
}

// Lanes that move.
__m512i _mm512_permutexvar_epi16(__m512i index, __m512i x) {
  const auto from = reinterpret_cast<Shorts>(x), at = reinterpret_cast<Shorts>(index);
  Shorts to{};
  for (int i = 0; i < 32; ++i) to[i] = from[at[i] & 31];
  return reinterpret_cast<__m512i>(to);
}
__m512i _mm512_permutex2var_epi16(__m512i x, __m512i index, __m512i y) {
  const auto first = reinterpret_cast<Shorts>(x), second = reinterpret_cast<Shorts>(y),
             at = reinterpret_cast<Shorts>(index);
  Shorts to{};
  for (int i = 0; i < 32; ++i) to[i] = (at[i] & 32) != 0 ? second[at[i] & 31] : first[at[i] & 31];
  return reinterpret_cast<__m512i>(to);
}
__m512 _mm512_permutex2var_ps(__m512 x, __m512i index, __m512 y) {
  const Words at = words(index);
  return from_lanes([&](int i) { return (at[i] & 16) != 0 ? y[at[i] & 15] : x[at[i] & 15]; });
}
__m512 _mm512_unpacklo_ps(__m512 a, __m512 b) {  // within 128 bits
  return from_lanes([&](int i) {
    const int from = i / 4 * 4 + i % 4 / 2;
    return i % 2 == 0 ? a[from] : b[from];
  });
}
__m512 _mm512_unpackhi_ps(__m512 a, __m512 b) {
  return from_lanes([&](int i) {
    const int from = i / 4 * 4 + 2 + i % 4 / 2;
    return i % 2 == 0 ? a[from] : b[from];
  });
}
__m512d _mm512_unpacklo_pd(__m512d a, __m512d b) {
  return __m512d{a[0], b[0], a[2], b[2], a[4], b[4], a[6], b[6]};
}
__m512d _mm512_unpackhi_pd(__m512d a, __m512d b) {
  return __m512d{a[1], b[1], a[3], b[3], a[5], b[5], a[7], b[7]};
}
__m512 _mm512_shuffle_f32x4(__m512 a, __m512 b, int choice) {
  return from_lanes([&](int i) {
    const int from = (choice >> i / 4 * 2 & 3) * 4 + i % 4;
    return i < 8 ? a[from] : b[from];
  });
}

// bfloat16.
__m256bh _mm512_cvtneps_pbh(__m512 x) {
  uint16_t to[16];
  for (int i = 0; i < 16; ++i) to[i] = bfloat16_of(x[i]);
  return read<__m256bh>(to);
}
__m512bh _mm512_cvtne2ps_pbh(__m512 high, __m512 low) {
  uint16_t to[32];
  for (int i = 0; i < 32; ++i) to[i] = bfloat16_of(i < 16 ? low[i] : high[i - 16]);
  return read<__m512bh>(to);
}
// Two fused multiply-adds, that of the upper numbers first.
__m512 _mm512_dpbf16_ps(__m512 c, __m512bh a, __m512bh b) {
  const auto x = reinterpret_cast<Words>(a), y = reinterpret_cast<Words>(b);
  c = fused(high_of(x), high_of(y), flushed(c));
  c = fused(low_of(x), low_of(y), flushed(c));
  return flushed(c);
}

// Tiles.
void _tile_loadconfig(const void* p) {
  struct Config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t n_rows[16];
  };
  const auto config = read<Config>(p);
  assert(config.palette == 1 && config.start_row == 0);
  for (const uint8_t x : config.reserved) assert(x == 0);
  Tiles& tiles = emulator::tiles();
  tiles = {};
  for (int i = 0; i < 16; ++i) {
    assert(config.row_bytes[i] <= 64 && config.n_rows[i] <= 16);
    assert((config.row_bytes[i] == 0) == (config.n_rows[i] == 0));
    assert(i < 8 || config.n_rows[i] == 0);
    if (i >= 8) continue;
    tiles.row_bytes[i] = config.row_bytes[i];
    tiles.n_rows[i] = config.n_rows[i];
  }
}
void _tile_release() { tiles() = {}; }
void _tile_zero(int tile) {
  std::memset(configured_tiles(tile).rows[tile], 0, sizeof(Tiles::rows[0]));
}
// c[m, n] += the sum over k of a b of the lower numbers + that of the upper ones, by fused
// multiply-adds.
void _tile_dpbf16ps(int c, int a, int b) {
  Tiles& tiles = configured_tiles(c);
  configured_tiles(a);
  configured_tiles(b);
  assert(a != b && a != c && b != c);
  const int n_pairs = tiles.row_bytes[a] / 4;
  assert(tiles.n_rows[c] == tiles.n_rows[a] && n_pairs == tiles.n_rows[b] &&
         tiles.row_bytes[c] == tiles.row_bytes[b]);
  __m512 low[16], high[16];
  for (int k = 0; k < n_pairs; ++k) {
    const auto pairs = read<Words>(tiles.rows[b][k]);
    low[k] = low_of(pairs);
    high[k] = high_of(pairs);
  }
  for (int m = 0; m < tiles.n_rows[c]; ++m) {
    const auto pairs = read<Words>(tiles.rows[a][m]);
    const __m512 a_low = low_of(pairs), a_high = high_of(pairs);
    __m512 low_sum{}, high_sum{};
    for (int k = 0; k < n_pairs; ++k) {
      low_sum = flushed(fused(_mm512_set1_ps(a_low[k]), low[k], low_sum));
      high_sum = flushed(fused(_mm512_set1_ps(a_high[k]), high[k], high_sum));
    }
    const __m512 before = flushed(read<__m512>(tiles.rows[c][m]));
    const __m512 sum = flushed(before + flushed(low_sum + high_sum));
    std::memcpy(tiles.rows[c][m], &sum, sizeof(sum));
  }
}

}  // namespace wgpt

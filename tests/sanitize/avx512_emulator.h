// The AVX-512, AVX-512-BF16 and AMX instructions of our CPU kernels on any x86-64 machine with AVX2.
//
// Force-included before a target_*.cpp that is compiled for AVX2. GCC has the types and their
// operators without the instructions; the intrinsics here hide its own, because wgpt encloses the
// kernels. One that is missing here does not compile. Results are those of Intel's manual; where that
// leaves a choice (rcp14) they are as far off as they may be.
//
// What touches memory is here, in sight of AddressSanitizer: by memcpy, whose every byte it checks, or
// lane by lane, and never a lane that is masked off. Tile loads too, which are assembly otherwise.
// Aligned accesses are checked, and that tiles are configured. What only computes is in
// avx512_emulator.cpp, without sanitizers.
#pragma once

#include <immintrin.h>
#undef _mm512_setr_epi32
#undef _tile_dpbf16ps
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero

#include <cassert>
#include <cstdint>
#include <cstring>

#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512DQ__ 1
#define __AVX512VL__ 1
#if defined(WGPT_EMULATE_BF16)
#define __AVX512BF16__ 1
#endif
#if defined(WGPT_EMULATE_AMX)
#define __AMX_TILE__ 1
#define __AMX_BF16__ 1
#endif

namespace wgpt {
namespace emulator {

template <typename To>
inline To read(const void* p) {
  To x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}
inline bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 64 == 0; }
inline bool has(__mmask16 mask, int i) { return (mask >> i & 1) != 0; }

// The eight tile registers of a thread. Like the hardware, there are none until they are configured.
struct Tiles {
  int row_bytes[8], n_rows[8];
  alignas(64) uint8_t rows[8][16][64];
};
Tiles& tiles();
inline Tiles& configured_tiles(int tile) {
  assert(tile >= 0 && tile < 8 && tiles().n_rows[tile] > 0);
  return tiles();
}

}  // namespace emulator

// Casts.
inline __m512 _mm512_castsi512_ps(__m512i x) { return reinterpret_cast<__m512>(x); }
inline __m512i _mm512_castps_si512(__m512 x) { return reinterpret_cast<__m512i>(x); }
inline __m512d _mm512_castps_pd(__m512 x) { return reinterpret_cast<__m512d>(x); }
inline __m512 _mm512_castpd_ps(__m512d x) { return reinterpret_cast<__m512>(x); }
inline float _mm512_cvtss_f32(__m512 x) { return x[0]; }
__m256i _mm512_castsi512_si256(__m512i x);
__m256i _mm512_extracti64x4_epi64(__m512i x, int half);

// Constants.
__m512 _mm512_set1_ps(float x);
__m512i _mm512_set1_epi32(int x);
__m512i _mm512_set1_epi16(short x);
template <typename... Ints>
__m512i _mm512_setr_epi32(Ints... x) {
  static_assert(sizeof...(x) == 16);
  const int lanes[16] = {x...};
  return emulator::read<__m512i>(lanes);
}

// Memory.
inline __m512 _mm512_loadu_ps(const void* p) { return emulator::read<__m512>(p); }
inline __m512i _mm512_loadu_si512(const void* p) { return emulator::read<__m512i>(p); }
inline __m512i _mm512_load_si512(const void* p) {
  assert(emulator::is_aligned(p));
  return emulator::read<__m512i>(p);
}
inline void _mm512_storeu_ps(void* p, __m512 x) { std::memcpy(p, &x, sizeof(x)); }
inline void _mm512_storeu_si512(void* p, __m512i x) { std::memcpy(p, &x, sizeof(x)); }
inline void _mm512_store_si512(void* p, __m512i x) {
  assert(emulator::is_aligned(p));
  std::memcpy(p, &x, sizeof(x));
}
inline __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const void* p) {
  const auto* from = static_cast<const float*>(p);
  __m512 x{};
  for (int i = 0; i < 16; ++i)
    if (emulator::has(mask, i)) x[i] = from[i];
  return x;
}
inline __m512i _mm512_maskz_loadu_epi32(__mmask16 mask, const void* p) {
  return _mm512_castps_si512(_mm512_maskz_loadu_ps(mask, p));
}
inline void _mm512_mask_storeu_ps(void* p, __mmask16 mask, __m512 x) {
  for (int i = 0; i < 16; ++i)
    if (emulator::has(mask, i)) static_cast<float*>(p)[i] = x[i];
}
inline void _mm512_mask_storeu_epi32(void* p, __mmask16 mask, __m512i x) {
  _mm512_mask_storeu_ps(p, mask, _mm512_castsi512_ps(x));
}

// Floats.
__m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c);
__m512 _mm512_fnmadd_ps(__m512 a, __m512 b, __m512 c);
__m512 _mm512_max_ps(__m512 a, __m512 b);
__m512 _mm512_min_ps(__m512 a, __m512 b);
__m512 _mm512_mask_sub_ps(__m512 otherwise, __mmask16 mask, __m512 a, __m512 b);
__m512 _mm512_mask_blend_ps(__mmask16 mask, __m512 a, __m512 b);
__mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int predicate);
__m512 _mm512_rcp14_ps(__m512 x);
__m512 _mm512_reduce_ps(__m512 x, int control);
__m512 _mm512_scalef_ps(__m512 a, __m512 b);
float _mm512_reduce_add_ps(__m512 x);
float _mm512_reduce_max_ps(__m512 x);

// Integers.
__m512i _mm512_add_epi32(__m512i a, __m512i b);
__m512i _mm512_add_epi16(__m512i a, __m512i b);
__m512i _mm512_and_si512(__m512i a, __m512i b);
__m512i _mm512_or_si512(__m512i a, __m512i b);
__m512i _mm512_mask_or_epi32(__m512i otherwise, __mmask16 mask, __m512i a, __m512i b);
__m512i _mm512_slli_epi32(__m512i x, unsigned n);
__m512i _mm512_srli_epi32(__m512i x, unsigned n);
__m512i _mm512_ternarylogic_epi32(__m512i a, __m512i b, __m512i c, int table);
__mmask16 _mm512_cmpge_epi32_mask(__m512i a, __m512i b);
__mmask16 _mm512_mask_cmplt_epi32_mask(__mmask16 mask, __m512i a, __m512i b);

// Other types.
__m512i _mm512_cvtepi8_epi32(__m128i x);
__m512 _mm512_cvtepi32_ps(__m512i x);
__m512i _mm512_cvtepu16_epi32(__m256i x);
__m256i _mm512_cvtepi32_epi16(__m512i x);
__m512 _mm512_cvtph_ps(__m256i x);
__m256i _mm512_cvtps_ph(__m512 x, int rounding);
__m256bh _mm512_cvtneps_pbh(__m512 x);
__m512bh _mm512_cvtne2ps_pbh(__m512 high, __m512 low);

// Lanes that move.
__m512i _mm512_permutexvar_epi16(__m512i index, __m512i x);
__m512i _mm512_permutex2var_epi16(__m512i x, __m512i index, __m512i y);
__m512 _mm512_permutex2var_ps(__m512 x, __m512i index, __m512 y);
__m512 _mm512_unpacklo_ps(__m512 a, __m512 b);
__m512 _mm512_unpackhi_ps(__m512 a, __m512 b);
__m512d _mm512_unpacklo_pd(__m512d a, __m512d b);
__m512d _mm512_unpackhi_pd(__m512d a, __m512d b);
__m512 _mm512_shuffle_f32x4(__m512 a, __m512 b, int choice);

// bfloat16 dot products.
__m512 _mm512_dpbf16_ps(__m512 c, __m512bh a, __m512bh b);
void _tile_dpbf16ps(int c, int a, int b);

// Tiles.
void _tile_loadconfig(const void* p);
void _tile_release();
void _tile_zero(int tile);
inline void _tile_loadd(int tile, const void* p, int64_t stride) {
  _tile_zero(tile);
  emulator::Tiles& tiles = emulator::configured_tiles(tile);
  for (int r = 0; r < tiles.n_rows[tile]; ++r) {
    std::memcpy(tiles.rows[tile][r], static_cast<const char*>(p) + r * stride,
                static_cast<size_t>(tiles.row_bytes[tile]));
  }
}
inline void _tile_stored(int tile, void* p, int64_t stride) {
  const emulator::Tiles& tiles = emulator::configured_tiles(tile);
  for (int r = 0; r < tiles.n_rows[tile]; ++r) {
    std::memcpy(static_cast<char*>(p) + r * stride, tiles.rows[tile][r],
                static_cast<size_t>(tiles.row_bytes[tile]));
  }
}
}  // namespace wgpt

// Shared-memory tiles, and mma fragments with one interface for 16-bit elements (one mma) and for float32 (3xTF32: three
// tf32 mma, which keep float32 accuracy).
#pragma once

#include "kernels/cuda/device/mma.cuh"

namespace wgpt::cuda {

// Rows of contiguous elements, a stride apart.
template <typename T>
struct Rows {
  T* data;
  int64_t stride;

  WGPT_DEVICE T* row(int64_t i) const { return data + i * stride; }
};

// ---- tiles in shared memory ------------------------------------------------------------------------------------------

// Rows of D elements in 16-byte chunks. 16-bit rows are swizzled so that the eight rows of an ldmatrix phase fall into
// eight different groups of four banks; float32 rows are padded by 4 floats so that the scalar fragment loads below hit
// 32 different banks.
//
//   16 bit, D >= 64: chunk c of row r lies at c ^ (r % 8)        D = 32: two rows fill 128 bytes: c ^ (r / 2 % 4)
template <typename T, int D>
struct SmemTile {
  static constexpr int kW = kVecLanes<T>;
  static constexpr bool kFloat = sizeof(T) == 4;
  static constexpr int kPitch = kFloat ? D + 4 : D;  // elements

  T* base;

  WGPT_HOST_DEVICE static constexpr int elements(int rows) { return rows * kPitch; }

  // The chunk that holds column (a multiple of kW).
  WGPT_DEVICE T* chunk(int row, int column) const {
    if constexpr (kFloat) {
      return base + row * kPitch + column;
    } else {
      return base + offset(row, column);
    }
  }

  // The chunk of (row0 + row, column0 + column) in a 16-bit tile, with row0 a multiple of 8, column0 of 16 and column < 16:
  // row and column are the lane's, so one offset serves all chunks that the lane reads.
  WGPT_DEVICE T* chunk(int row0, int row, int column0, int column) const {
    return base + row0 * kPitch + (offset(row, column) ^ column0);
  }

  // Of a 16-bit tile, in elements.
  static WGPT_DEVICE int offset(int row, int column) {
    const int c = column / kW;
    const int swizzled = D == 32 ? c ^ (row / 2 % 4) : c ^ (row % 8);
    return row * kPitch + swizzled * kW;
  }
};

// ---- fragments -------------------------------------------------------------------------------------------------------

// A is 16 x 16, B 16 x 8, C 16 x 8 (float32). With g = lane / 4 and t = lane % 4, a lane holds C (g, 2t) (g, 2t + 1)
// (g + 8, 2t) (g + 8, 2t + 1). float32 fragments are two 8-deep halves h. Because the summed index may be renumbered at
// will, the pair (load_a, load_b_rows) uses k = 8h + t and 8h + t + 4, and (a_from_accumulators or load_a_columns,
// load_b_columns) use k = 8h + 2t and 8h + 2t + 1: there a lane's accumulators C are its values of A without a shuffle.
template <typename T>
struct FragmentA {
  uint32_t r[4];
};
template <>
struct FragmentA<float> {
  float v[2][4];
};
template <typename T>
struct FragmentB {
  uint32_t r[2];
};
template <>
struct FragmentB<float> {
  float v[2][2];
};

WGPT_DEVICE int lane_id() { return threadIdx.x % kWarp; }

// a[m][k] = tile[row0 + m][k0 + k]
template <typename T, int D>
WGPT_DEVICE void load_a(FragmentA<T>& a, const SmemTile<T, D>& tile, int row0, int k0) {
  const int lane = lane_id();
  if constexpr (sizeof(T) == 4) {
    const int g = lane / 4, t = lane % 4;
    WGPT_UNROLL
    for (int h = 0; h < 2; ++h) {
      WGPT_UNROLL
      for (int i = 0; i < 4; ++i)
        a.v[h][i] = tile.base[(row0 + g + i % 2 * 8) * tile.kPitch + k0 + 8 * h + t + i / 2 * 4];
    }
  } else {
    const int matrix = lane / 8;  // rows 0-7 | 8-15 of columns 0-7, then of columns 8-15
    ldmatrix_x4(a.r, tile.chunk(row0, matrix % 2 * 8 + lane % 8, k0, matrix / 2 * 8));
  }
}

// a[m][k] = tile[k0 + k][m0 + m], for use with load_b_columns
template <typename T, int D>
WGPT_DEVICE void load_a_columns(FragmentA<T>& a, const SmemTile<T, D>& tile, int k0, int m0) {
  const int lane = lane_id();
  if constexpr (sizeof(T) == 4) {
    const int g = lane / 4, t = lane % 4;
    WGPT_UNROLL
    for (int h = 0; h < 2; ++h) {
      WGPT_UNROLL
      for (int i = 0; i < 4; ++i) {
        a.v[h][i] = tile.base[(k0 + 8 * h + 2 * t + i / 2) * tile.kPitch + m0 + g + i % 2 * 8];
      }
    }
  } else {
    const int matrix = lane / 8;  // columns 0-7 | 8-15 of rows 0-7, then of rows 8-15
    ldmatrix_x4_trans(a.r, tile.chunk(k0, matrix / 2 * 8 + lane % 8, m0, matrix % 2 * 8));
  }
}

// b[i][k][n] = tile[n0 + 8i + n][k0 + k]
template <typename T, int D>
WGPT_DEVICE void load_b_rows(FragmentB<T> (&b)[2], const SmemTile<T, D>& tile, int n0, int k0) {
  const int lane = lane_id();
  if constexpr (sizeof(T) == 4) {
    const int g = lane / 4, t = lane % 4;
    WGPT_UNROLL
    for (int i = 0; i < 2; ++i) {
      WGPT_UNROLL
      for (int h = 0; h < 2; ++h) {
        const float* p = tile.base + (n0 + 8 * i + g) * tile.kPitch + k0 + 8 * h + t;
        b[i].v[h][0] = p[0];
        b[i].v[h][1] = p[4];
      }
    }
  } else {
    const int matrix = lane / 8;  // columns 0-7 | 8-15 of rows 0-7, then of rows 8-15
    uint32_t r[4];
    ldmatrix_x4(r, tile.chunk(n0, matrix / 2 * 8 + lane % 8, k0, matrix % 2 * 8));
    b[0].r[0] = r[0];
    b[0].r[1] = r[1];
    b[1].r[0] = r[2];
    b[1].r[1] = r[3];
  }
}

// b[i][k][n] = tile[k0 + k][n0 + 8i + n]
template <typename T, int D>
WGPT_DEVICE void load_b_columns(FragmentB<T> (&b)[2], const SmemTile<T, D>& tile, int k0, int n0) {
  const int lane = lane_id();
  if constexpr (sizeof(T) == 4) {
    const int g = lane / 4, t = lane % 4;
    WGPT_UNROLL
    for (int i = 0; i < 2; ++i) {
      WGPT_UNROLL
      for (int h = 0; h < 2; ++h) {
        const float* p = tile.base + (k0 + 8 * h + 2 * t) * tile.kPitch + n0 + 8 * i + g;
        b[i].v[h][0] = p[0];
        b[i].v[h][1] = p[tile.kPitch];
      }
    }
  } else {
    const int matrix = lane / 8;  // rows 0-7 | 8-15 of columns 0-7, then of columns 8-15
    uint32_t r[4];
    ldmatrix_x4_trans(r, tile.chunk(k0, matrix % 2 * 8 + lane % 8, n0, matrix / 2 * 8));
    b[0].r[0] = r[0];
    b[0].r[1] = r[1];
    b[1].r[0] = r[2];
    b[1].r[1] = r[3];
  }
}

// The accumulators of two neighbouring 16 x 8 mma as the 16 x 16 A fragment of the next one, rounded to T.
template <typename T>
WGPT_DEVICE void a_from_accumulators(FragmentA<T>& a, const float (&left)[4],
                                     const float (&right)[4]) {
  if constexpr (sizeof(T) == 4) {
    WGPT_UNROLL
    for (int i = 0; i < 4; ++i) {  // A (g, k) (g + 8, k) (g, k') (g + 8, k') = C 0, 2, 1, 3
      a.v[0][i] = left[i % 2 * 2 + i / 2];
      a.v[1][i] = right[i % 2 * 2 + i / 2];
    }
  } else {
    a.r[0] = pack2<T>(left[0], left[1]);
    a.r[1] = pack2<T>(left[2], left[3]);
    a.r[2] = pack2<T>(right[0], right[1]);
    a.r[3] = pack2<T>(right[2], right[3]);
  }
}

// c += a b. float32 is 3xTF32: every value is two tf32 terms, x = high + low up to 2^-22 of x; three of the four term
// pairs matter, small ones first. A tensor core cuts its sums toward zero (docs/kernels.md): it adds
// up these products only, from zero, and a float32 addition, which rounds to nearest, adds them to c. kMirrored: the order
// that gives b^T a^T the same bits.
template <typename T, bool kMirrored = false>
WGPT_DEVICE void mma(float (&c)[4], const FragmentA<T>& a, const FragmentB<T>& b) {
  if constexpr (sizeof(T) == 4) {
    uint32_t a_high[2][4], a_low[2][4], b_high[2][2], b_low[2][2];
    WGPT_UNROLL
    for (int h = 0; h < 2; ++h) {
      WGPT_UNROLL
      for (int i = 0; i < 4; ++i) {
        a_high[h][i] = round_to_tf32(a.v[h][i]);
        a_low[h][i] = round_to_tf32(a.v[h][i] - __uint_as_float(a_high[h][i]));
      }
      WGPT_UNROLL
      for (int i = 0; i < 2; ++i) {
        b_high[h][i] = round_to_tf32(b.v[h][i]);
        b_low[h][i] = round_to_tf32(b.v[h][i] - __uint_as_float(b_high[h][i]));
      }
    }
    float sum[4] = {};
    WGPT_UNROLL
    for (int h = 0; h < 2; ++h) {
      if constexpr (kMirrored) mma_m16n8k8_tf32(sum, a_high[h], b_low[h]);
      mma_m16n8k8_tf32(sum, a_low[h], b_high[h]);
      if constexpr (!kMirrored) mma_m16n8k8_tf32(sum, a_high[h], b_low[h]);
    }
    WGPT_UNROLL
    for (int h = 0; h < 2; ++h) mma_m16n8k8_tf32(sum, a_high[h], b_high[h]);
    WGPT_UNROLL
    for (int i = 0; i < 4; ++i) c[i] += sum[i];
  } else {
    mma_m16n8k16<T>(c, a.r, b.r);
  }
}

template <int kN>
WGPT_DEVICE void clear(float (&c)[kN][4]) {
  WGPT_UNROLL
  for (int n = 0; n < kN; ++n) {
    WGPT_UNROLL
    for (int i = 0; i < 4; ++i) c[n][i] = 0.f;
  }
}
template <int kM, int kN>
WGPT_DEVICE void clear(float (&c)[kM][kN][4]) {
  WGPT_UNROLL
  for (int m = 0; m < kM; ++m) clear(c[m]);
}

}  // namespace wgpt::cuda

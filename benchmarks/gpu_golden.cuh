// Probes of the device wrappers (csrc/kernels/cuda/device): one warp, every lane brings `in_words` 32-bit words and
// leaves `out_words`. The same kernel runs on a GPU (gpu_golden.cu records it) and on the emulator (the tests compare).
#pragma once

#include "kernels/cuda/device/mma.cuh"

namespace wgpt::cuda::golden {

enum ProbeId {
  kLdmatrix,
  kLdmatrixTrans,
  kMmaBf16,
  kMmaHalf,
  kMmaTf32,
  kToBf16,
  kToHalf,
  kFromHalf,
  kPackBf16,
  kPackHalf,
  kToTf32,
  kExp2,
  kCopyAsync,
  kProbes
};

struct Probe {
  const char* name;
  int in_words, out_words;
};

// ldmatrix: words 0-3 of lane l are row l of four stacked 8 x 8 matrices. mma: A, B, C. Conversions: one value a lane.
constexpr Probe kProbe[kProbes] = {{"ldmatrix_x4", 4, 4},
                                   {"ldmatrix_x4_trans", 4, 4},
                                   {"mma_m16n8k16_bf16", 10, 4},
                                   {"mma_m16n8k16_half", 10, 4},
                                   {"mma_m16n8k8_tf32", 10, 4},
                                   {"to_bf16", 1, 1},
                                   {"to_half", 1, 1},
                                   {"from_half", 1, 1},
                                   {"pack2_bf16", 2, 1},
                                   {"pack2_half", 2, 1},
                                   {"round_to_tf32", 1, 1},
                                   {"exp2_approx", 1, 1},
                                   {"copy_async16", 8, 4}};

__global__ void __launch_bounds__(kWarp)
    probe_kernel(int id, int in_words, int out_words, const uint32_t* in, uint32_t* out) {
  using Row = Vec<uint32_t, 4>;
  WGPT_SHARED(Row, rows, kWarp);
  const int lane = threadIdx.x;
  const uint32_t* mine = in + lane * in_words;
  uint32_t* result = out + lane * out_words;
  if (id == kLdmatrix || id == kLdmatrixTrans) {
    for (int i = 0; i < 4; ++i) rows[lane].e[i] = mine[i];
    __syncwarp();
    uint32_t r[4];
    if (id == kLdmatrix) {
      ldmatrix_x4(r, &rows[lane]);
    } else {
      ldmatrix_x4_trans(r, &rows[lane]);
    }
    for (int i = 0; i < 4; ++i) result[i] = r[i];
  } else if (id == kMmaBf16 || id == kMmaHalf || id == kMmaTf32) {
    const uint32_t a[4] = {mine[0], mine[1], mine[2], mine[3]}, b[2] = {mine[4], mine[5]};
    float c[4];
    for (int i = 0; i < 4; ++i) c[i] = __uint_as_float(mine[6 + i]);
    if (id == kMmaBf16) {
      mma_m16n8k16<Bf16>(c, a, b);
    } else if (id == kMmaHalf) {
      mma_m16n8k16<Half>(c, a, b);
    } else {
      mma_m16n8k8_tf32(c, a, b);
    }
    for (int i = 0; i < 4; ++i) result[i] = __float_as_uint(c[i]);
  } else if (id == kCopyAsync) {  // the fifth word says whether the copy is valid; the rest aligns
    copy_async16(&rows[lane], mine, mine[4] != 0);
    copy_async_commit();
    copy_async_wait<0>();
    for (int i = 0; i < 4; ++i) result[i] = rows[lane].e[i];
  } else {
    const float x = __uint_as_float(mine[0]);
    if (id == kToBf16) result[0] = from_float<Bf16>(x).bits;
    if (id == kToHalf) result[0] = from_float<Half>(x).bits;
    if (id == kFromHalf)
      result[0] = __float_as_uint(to_float(Half{static_cast<uint16_t>(mine[0])}));
    if (id == kPackBf16) result[0] = pack2<Bf16>(x, __uint_as_float(mine[1]));
    if (id == kPackHalf) result[0] = pack2<Half>(x, __uint_as_float(mine[1]));
    if (id == kToTf32) result[0] = round_to_tf32(x);
    if (id == kExp2) result[0] = __float_as_uint(exp2_approx(x));
  }
}

inline const char* run_probe(int id, const uint32_t* in, uint32_t* out, void* stream) {
  return launch(probe_kernel, 1, kWarp, 0, stream, id, kProbe[id].in_words, kProbe[id].out_words,
                in, out);
}

}  // namespace wgpt::cuda::golden

// GEMM: c = a b, or c += a b, on CPUs where ours is faster than torch's.
//
// With vector FMAs, accumulation is float32 over blocks of k, whose sums are added; bfloat16 and float16
// are rounded once, after all of k. On CPUs with AMX, float32 is emulated by three bfloat16 terms each
// (bf16x3):
//
//   x = high + mid + low, each the nearest bfloat16 to the rest: 24 bits and their signs, so x exactly,
//   down to about 2^-110 (AMX flushes subnormals to zero)
//   a b = sum over k of  high high + high mid + mid high + mid mid + high low + low high
//
// The product of two bfloat16 is exact in float32. The three term pairs left out are below 2^-26 of
// |a| |b|, a quarter of the rounding of one FMA; accumulation is float32 over blocks of 16 pairs, so the
// error is that of a float32 GEMM or smaller (tests hold it to that). Six bfloat16 GEMMs at sixteen times
// the FLOPs per cycle of float32 FMAs. Infinities split into NaN: gemm then returns false where some
// element of c is not finite, and the caller computes c another way.
//
// a (m, k) and b (k, n) by strides, of which one is 1 in each; c (m, n) by rows. An element of c
// has the same bits for any number of threads and whatever the other rows and columns hold.
//
// Prepacked (packed_addmm): c = addend + a b with b packed once, for many calls with few rows each, as in
// decoding. b is float32, bfloat16, or int8 with a scale for each column (weight-only quantisation,
// symmetric): c = addend + scale (a b). a and c are float32, and elements of b become float32 in registers:
// float32 FMAs on every target, and batch-invariant: the bits of a row do not depend on m either.
// k is summed in blocks of kPrepackedDepth, each in order, and the blocks in order. All of b is read, so
// with few rows memory bandwidth is the limit, and half or a quarter of the bytes half or a quarter of the
// time; with many, the FMAs.
#pragma once

#include "kernels/common.h"

namespace wgpt {

constexpr int64_t kPanelColumns = 64, kPrepackedDepth = 256;

// How b is packed.
enum class Packing {
  kPackPerCall,  // into the workspace, some blocks of k at a time
  kPackAndKeep,  // all of it into the workspace, for calls to come
  kPackedBefore,  // the workspace holds it: a call with kPackAndKeep had the same workspace, b, n and k
  kPrepacked,  // b is panels of kPanelColumns columns already: (ceil(n / 64), k, 64), zero past n
};

// Elements of prepacked panels.
enum class PanelType { kFloat32, kBFloat16, kInt8 };

struct Gemm {
  DType dtype;  // of a, b and c
  int64_t m, n, k;
  const void *a, *b;
  int64_t a_row, a_column, b_row, b_column;  // strides in elements
  void* c;
  int64_t c_row;
  bool accumulate;  // c += a b
  Packing b_packing;
  void* workspace;  // gemm_workspace_bytes, 64-byte aligned
  // kPrepacked only, which needs float32, a by rows and accumulate = false:
  const void* addend =
      nullptr;  // (m, n), rows addend_row apart (0: one row for all), or nullptr for zero
  int64_t addend_row = 0;
  PanelType b_type = PanelType::kFloat32;
  const float* b_scale = nullptr;  // (n,), where b is int8
};

}  // namespace wgpt

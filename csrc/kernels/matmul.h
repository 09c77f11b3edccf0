// matmul: matrix product c = a b, or c += a b, on CPUs where ours is faster than torch's.
//
// By vector multiply-adds, sums run in float32 over blocks of k, whose sums are added; bfloat16 and
// float16 are rounded once, when all of k is summed. On CPUs whose matrix unit multiplies bfloat16 (AMX)
// float32 is made of three of them each:
//
//   x = high + mid + low, each the nearest bfloat16 to what is left: 24 bits and their signs, so x
//   itself down to 2^-110 or so (AMX takes subnormals for zero)
//   a b = sum over k of  high high + high mid + mid high + mid mid + high low + low high
//
// Products of two bfloat16 are exact in float32. The three that are left out are below 2^-26 of
// |a| |b|, a quarter of the rounding of one multiply-add; sums run in float32 over blocks of 16
// pairs, so the error is that of a float32 product or smaller (tests hold it to that). Six products
// at sixteen times the rate of float32 multiply-adds a cycle. Infinities split into NaN: there matmul
// answers false where some element of c is not finite, for the caller to ask another implementation
// what it should be.
//
// a (m, k) and b (k, n) by strides, of which one is 1 in each; c (m, n) by rows. An element of c
// has the same bits for any number of threads and whatever the other rows and columns hold.
#pragma once

#include "kernels/common.h"

namespace wgpt {

// How b is packed into the workspace.
enum class Packing {
  kByBlocks,  // of k, for this product
  kKeep,      // all of it, for products to come
  kKept,      // it is there: a product with kKeep has had the same workspace, b, n and k
};

struct Matmul {
  DType dtype;  // of a, b and c
  int64_t m, n, k;
  const void *a, *b;
  int64_t a_row, a_column, b_row, b_column;  // strides in elements
  void* c;
  int64_t c_row;
  bool accumulate;  // c += a b
  Packing b_packing;
  void* workspace;  // of matmul_workspace_bytes
};

}  // namespace wgpt

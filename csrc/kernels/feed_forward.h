// feed_forward's own arithmetic: the exact GELU between its two GEMMs.
//
//   forward: active = gelu(z)
//   backward: active = gelu(z) again, d_z = d_active gelu'(z)
//
// n contiguous elements of one type; float32 (float64) arithmetic. d_z may be d_active itself.
// Keeping z alone and making active again costs no memory traffic: backward reads z anyway.
#pragma once

#include "kernels/common.h"

namespace wgpt {

struct GeluForward {
  DType dtype;
  int64_t n;
  const void* z;
  void* active;
};

struct GeluBackward {
  DType dtype;
  int64_t n;
  const void *z, *d_active;
  void *active, *d_z;
};

}  // namespace wgpt

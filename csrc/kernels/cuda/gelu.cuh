// The exact GELU and its slope, shared by mel_embed and feed_forward.
#pragma once

#include "kernels/cuda/device/platform.cuh"

namespace wgpt::cuda {

// gelu(z) = z Phi(z); slope = d gelu / dz = Phi(z) + z phi(z)
WGPT_DEVICE float gelu(float z, float& slope) {
  const float cdf = 0.5f * (1.f + erff(z * 0.70710678f));
  slope = cdf + z * 0.39894228f * __expf(-0.5f * z * z);
  return z * cdf;
}

}  // namespace wgpt::cuda

// What the library of ops shows to the module of a Python (csrc/module.cpp): functions of dispatch.h, and
// which CUDA kernels it holds.
#pragma once

#include "kernels/cpu/dispatch/dispatch.h"

#define WGPT_EXPORTED __attribute__((visibility("default")))

namespace wgpt::cpu {

WGPT_EXPORTED const Kernels* const* available();
WGPT_EXPORTED const Kernels& active();
WGPT_EXPORTED void set_active(const char* target);
WGPT_EXPORTED double peak_flops(DType dtype);

}  // namespace wgpt::cpu

namespace wgpt {

// As nvcc writes them, with spaces between; empty without CUDA kernels.
struct CudaBuild {
  const char* archs;  // machine code
  const char* ptx;
  const char* toolkit;
};
WGPT_EXPORTED CudaBuild cuda_build();

}  // namespace wgpt

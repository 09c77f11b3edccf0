// The SIMT emulator in the place of csrc/ops/device.cpp: while it is switched on, CPU tensors are what CUDA tensors
// are elsewhere, so the ops take the same path through checks, workspace and launchers.
#include "kernels/cpu/dispatch/dispatch.h"
#include "machine_api.h"
#include "ops/runtime.h"

namespace wgpt {
namespace {

bool is_on = false;

}  // namespace

bool on_cuda(const Tensor& tensor) { return is_on && tensor.is_cpu(); }

// Every scope has a stream of its own, so that a launch on another one, or on none, is seen.
CudaScope::CudaScope(const char*, const Tensor&) {
  static uintptr_t n_scopes = 0;
  stream_ = reinterpret_cast<void*>(++n_scopes);
  simt::current_stream = stream_;
}

// Of the CPU kernels only the generic ones are here (WGPT_CPU_TARGET=generic): the others take minutes to compile.
#if defined(__x86_64__)
#define WGPT_ABSENT(target)        \
  namespace cpu::target {          \
  extern const Kernels kKernels;   \
  const Kernels kKernels{#target}; \
  }
WGPT_ABSENT(avx2)
WGPT_ABSENT(avx512)
WGPT_ABSENT(avx512_bf16)
WGPT_ABSENT(amx)
#elif defined(__aarch64__)
namespace cpu::neon {
extern const Kernels kKernels;
const Kernels kKernels{"neon"};
}  // namespace cpu::neon
#endif

}  // namespace wgpt

extern "C" void emulated_device_switch(int on) { wgpt::is_on = on != 0; }

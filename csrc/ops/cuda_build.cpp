// Which CUDA kernels this library holds: of the library itself, for a module may lie beside another.
#include "kernels/cpu/dispatch/exported.h"

namespace wgpt {

CudaBuild cuda_build() { return {WGPT_CUDA_ARCHS, WGPT_CUDA_PTX, WGPT_CUDA_TOOLKIT}; }

}  // namespace wgpt

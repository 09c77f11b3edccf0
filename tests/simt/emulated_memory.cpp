// torch's CPU tensors in the emulator's arena: poisoned, between red zones, and the only memory that kernels may touch.
#include <c10/core/CPUAllocator.h>

#include "simt/simt.h"

namespace {

void release(void* memory) {
  if (memory != nullptr) simt::free(memory);
}

struct ArenaAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t n_bytes) override {
    void* memory = n_bytes == 0 ? nullptr : simt::allocate(n_bytes);
    TORCH_CHECK(n_bytes == 0 || memory != nullptr,
                "the emulator's arena is out of memory: ", n_bytes, " bytes");
    return {memory, memory, &release, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t n_bytes) const override {
    default_copy_data(to, from, n_bytes);
  }
};

}  // namespace

// Of all tensors that torch makes from now on.
extern "C" void emulated_memory_install() {
  static ArenaAllocator& allocator = *new ArenaAllocator;
  c10::SetCPUAllocator(&allocator, 100);
}

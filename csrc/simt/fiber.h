// Stackful fibers: a stack and a saved stack pointer. A switch saves the callee-saved registers only, so it costs a few
// nanoseconds; one CUDA thread of the emulated block is one fiber.
#pragma once

#include <cstddef>

namespace simt {

struct Fiber {
  void* sp = nullptr;
  unsigned char* stack = nullptr;  // mapped at the first use and kept for the next block
};

constexpr size_t kStackBytes =
    128 * 1024;  // pages are touched, so cost memory, only as deep as a kernel goes

// Makes the next resume() of this fiber call entry(), which must never return. False when no stack could be mapped.
bool prepare_fiber(Fiber& fiber, void (*entry)());

// Leaves `from` (its place is saved) and continues `to`.
void switch_fiber(Fiber& from, Fiber& to);

}  // namespace simt

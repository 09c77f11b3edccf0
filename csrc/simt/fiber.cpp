#include "simt/fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstring>

// void simt_switch_stacks(void** save_sp, void* load_sp)
extern "C" void simt_switch_stacks(void** save_sp, void* load_sp) asm("simt_switch_stacks");

#if defined(__x86_64__)
asm(R"(
.text
.p2align 4
.globl simt_switch_stacks
simt_switch_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
#elif defined(__aarch64__)
asm(R"(
.text
.p2align 4
.globl simt_switch_stacks
simt_switch_stacks:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)");
#else
#error "The SIMT emulator knows x86-64 and aarch64; add the switch of your machine here."
#endif

namespace simt {

bool prepare_fiber(Fiber& fiber, void (*entry)()) {
  if (fiber.stack == nullptr) {
    void* stack =
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (stack == MAP_FAILED) return false;
    mprotect(stack, 4096, PROT_NONE);  // an overflow faults instead of reaching a neighbour
    fiber.stack = static_cast<unsigned char*>(stack);
  }
  unsigned char* top = fiber.stack + kStackBytes;
#if defined(__x86_64__)
  // ... r15 r14 r13 r12 rbx rbp | entry | 0 (no return address): aligned as if entry had been called
  void** frame = reinterpret_cast<void**>(top) - 8;
  std::memset(frame, 0, 64);
  frame[6] = reinterpret_cast<void*>(entry);
#else
  void** frame = reinterpret_cast<void**>(top) - 20;
  std::memset(frame, 0, 160);
  frame[11] = reinterpret_cast<void*>(entry);  // x30
#endif
  fiber.sp = frame;
  return true;
}

void switch_fiber(Fiber& from, Fiber& to) { simt_switch_stacks(&from.sp, to.sp); }

}  // namespace simt

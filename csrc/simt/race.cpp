// The race build: kernels are compiled with -fsanitize=thread, and these are the hooks that the compiler then calls at
// every memory access; the sanitizer's own library is not linked. Compile this file with SIMT_RACE for the race build
// (never instrumented itself), without it for the fast one.
//
// Shared memory: two accesses of one block to the same bytes, at least one a write, by different threads, must be
// ordered by a block barrier, or, within a warp, by a full __syncwarp. A read of bytes that no thread of the block has
// written is reported too. Tensors: blocks of a launch must not write what another block touches (atomics aside), and
// every access must stay inside one tensor. Two-byte granules: single-byte neighbours could be taken for conflicts.
#include "simt/machine.h"

#ifndef SIMT_RACE

namespace simt {
void note_read(const void*, size_t) {}
void note_write(const void*, size_t) {}
void check_future_write(const void*, size_t) {}
}  // namespace simt

#else

#include <sys/mman.h>

#include <cstdio>

namespace simt {
namespace {

constexpr size_t kGranule = 2;

// Who touched a granule of shared memory last. An epoch of the block orders everything before it; within one epoch a
// warp's own barriers order its lanes.
struct SharedCell {
  uint32_t write_epoch, write_warp_epoch, read_epoch, read_warp_epoch;
  uint16_t writer, reader;  // thread indices
  uint32_t written_in_block;
};
constexpr uint16_t kSeveralLanes = 0x8000;  // flag in reader: other lanes of that warp too
constexpr uint16_t kSeveralWarps = 0xffff;

struct TensorCell {
  uint32_t write_launch, writer_block, read_launch, reader_block;
};
constexpr uint32_t kSeveralBlocks = 0xffffffffu;

SharedCell shared_cells[(kSharedLimit + 64 * 1024) / kGranule];
TensorCell* tensor_cells = nullptr;

enum class Access { kRead, kWrite, kFutureWrite };

const char* who(uint16_t thread) {
  static char text[64];
  if (thread == kSeveralWarps) return "threads of several warps";
  std::snprintf(text, sizeof(text), "thread %d%s", thread & 0x3ff,
                (thread & kSeveralLanes) != 0 ? " and others of its warp" : "");
  return text;
}

bool ordered(uint32_t epoch, uint32_t warp_epoch, uint16_t other, const Thread& self) {
  if (epoch != machine.block_epoch) return true;
  if (other == kSeveralWarps) return false;
  const int other_thread = other & 0x3ff;
  if (other_thread / 32 != self.warp) return false;
  if (machine.warps[self.warp].epoch != warp_epoch) return true;
  return (other & kSeveralLanes) == 0 && other_thread == self.index;
}

void touch_shared(const void* p, size_t bytes, Access access) {
  const Thread& self = *machine.running;
  const uint32_t warp_epoch = machine.warps[self.warp].epoch;
  const size_t begin = static_cast<size_t>(static_cast<const unsigned char*>(p) - machine.shared);
  for (size_t i = begin / kGranule; i <= (begin + bytes - 1) / kGranule; ++i) {
    SharedCell& cell = shared_cells[i];
    if (!ordered(cell.write_epoch, cell.write_warp_epoch, cell.writer, self)) {
      fail("race: %s %s without a barrier after the write by %s",
           access == Access::kRead ? "reads" : "writes", describe(machine.shared + i * kGranule),
           who(cell.writer));
    }
    if (access == Access::kRead) {
      if (cell.written_in_block != machine.block_serial) {
        fail("reads %s, which no thread has written", describe(machine.shared + i * kGranule));
      }
      uint16_t reader = static_cast<uint16_t>(self.index);
      if (cell.read_epoch == machine.block_epoch) {
        const uint16_t other = cell.reader;
        if (other == kSeveralWarps || (other & 0x3ff) / 32 != self.warp) {
          reader = kSeveralWarps;
        } else if (cell.read_warp_epoch == warp_epoch && other != reader) {
          reader |= kSeveralLanes;
        }
      }
      cell.read_epoch = machine.block_epoch;
      cell.read_warp_epoch = warp_epoch;
      cell.reader = reader;
      continue;
    }
    if (!ordered(cell.read_epoch, cell.read_warp_epoch, cell.reader, self)) {
      fail("race: writes %s without a barrier after the read by %s",
           describe(machine.shared + i * kGranule), who(cell.reader));
    }
    if (access == Access::kWrite) {
      cell.write_epoch = machine.block_epoch;
      cell.write_warp_epoch = warp_epoch;
      cell.writer = static_cast<uint16_t>(self.index);
      cell.written_in_block = machine.block_serial;
    }
  }
}

void touch_tensor(const void* p, size_t bytes, Access access) {
  if (!tensor_range(p, bytes)) {
    fail("%zu-byte %s out of bounds, at %s", bytes, access == Access::kRead ? "read" : "write",
         describe(p));
  }
  if (tensor_cells == nullptr) {
    void* cells = mmap(nullptr, arena_bytes() / kGranule * sizeof(TensorCell),
                       PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (cells == MAP_FAILED) fail("no address space for the tensors' shadow");
    tensor_cells = static_cast<TensorCell*>(cells);
  }
  const uint32_t launch = machine.launch_serial, block = machine.block_serial;
  const size_t begin = static_cast<size_t>(static_cast<const unsigned char*>(p) - arena_base());
  for (size_t i = begin / kGranule; i <= (begin + bytes - 1) / kGranule; ++i) {
    TensorCell& cell = tensor_cells[i];
    if (cell.write_launch == launch && cell.writer_block != block) {
      fail("race between blocks: %s %s, which another block of this launch wrote",
           access == Access::kRead ? "reads" : "writes", describe(arena_base() + i * kGranule));
    }
    if (access == Access::kRead) {
      cell.reader_block =
          cell.read_launch == launch && cell.reader_block != block ? kSeveralBlocks : block;
      cell.read_launch = launch;
      continue;
    }
    if (cell.read_launch == launch && cell.reader_block != block) {
      fail("race between blocks: writes %s, which another block of this launch read",
           describe(arena_base() + i * kGranule));
    }
    cell.write_launch = launch;
    cell.writer_block = block;
  }
}

bool in_region(const void* p, size_t bytes) {
  const size_t offset = static_cast<size_t>(static_cast<const unsigned char*>(p) - machine.shared);
  for (const Region& region : machine.regions) {
    if (offset >= region.begin && offset + bytes <= region.end) return true;
  }
  return false;
}

inline void touch(const void* p, size_t bytes, Access access) {
  if (machine.running == nullptr || machine.failed) return;
  if (in_shared(p)) {
    if (!in_region(p, bytes)) {
      fail("%zu-byte %s out of bounds, at %s", bytes, access == Access::kRead ? "read" : "write",
           describe(p));
    }
    touch_shared(p, bytes, access);
  } else if (in_arena(p)) {
    touch_tensor(p, bytes, access);
  }
}

}  // namespace

void note_read(const void* p, size_t bytes) { touch(p, bytes, Access::kRead); }
void note_write(const void* p, size_t bytes) { touch(p, bytes, Access::kWrite); }
void check_future_write(const void* p, size_t bytes) { touch(p, bytes, Access::kFutureWrite); }

}  // namespace simt

#define SIMT_HOOK(kBytes)                                                                      \
  void __tsan_read##kBytes(void* p) { simt::touch(p, kBytes, simt::Access::kRead); }           \
  void __tsan_write##kBytes(void* p) { simt::touch(p, kBytes, simt::Access::kWrite); }         \
  void __tsan_unaligned_read##kBytes(void* p) { simt::touch(p, kBytes, simt::Access::kRead); } \
  void __tsan_unaligned_write##kBytes(void* p) { simt::touch(p, kBytes, simt::Access::kWrite); }

extern "C" {
SIMT_HOOK(1)
SIMT_HOOK(2)
SIMT_HOOK(4)
SIMT_HOOK(8)
SIMT_HOOK(16)
void __tsan_read_range(void* p, size_t bytes) { simt::touch(p, bytes, simt::Access::kRead); }
void __tsan_write_range(void* p, size_t bytes) { simt::touch(p, bytes, simt::Access::kWrite); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}
}

#endif  // SIMT_RACE

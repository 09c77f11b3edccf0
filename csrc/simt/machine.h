// The emulator's inside: what its own files share. Users include simt.h.
#pragma once

#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "simt/fiber.h"
#include "simt/simt.h"

namespace simt {

enum class State : uint8_t { kReady, kAtWarp, kAtBlock, kDone };

struct PendingCopy {
  unsigned char* to;
  const unsigned char* from;
  uint32_t bytes, source_bytes;
  bool done;  // arrived early
};

struct Thread {
  Fiber fiber;
  ThreadView view;
  int index = 0, lane = 0, warp = 0;
  State state = State::kDone;
  const char* waits_at = "";
  std::vector<PendingCopy> open_group;
  std::vector<std::vector<PendingCopy>> groups;  // committed, oldest first
};

// Where the lanes of one mask meet. The last to arrive executes for all.
struct Meeting {
  unsigned mask = 0, arrived = 0;  // mask 0: free
  const char* name = "";
  void* operand[32];
};

struct Warp {
  int first = 0, n_lanes = 0;  // threads [first, first + n_lanes)
  uint32_t epoch = 0;          // full warp barriers so far; the race checker's clock
  Meeting meetings[32];
};

// A piece of shared memory between red zones.
struct Region {
  const void* key;  // nullptr: the dynamic one
  size_t begin, end;
};

struct Machine {
  Policy policy;
  Counters counters{};
  Dim3 grid, block_dim;
  std::vector<Thread*> threads;
  std::vector<Warp> warps;
  int n_threads = 0, n_warps = 0, n_done = 0, n_at_block = 0, predicate_sum = 0,
      last_predicate_sum = 0;
  Thread* running = nullptr;  // nullptr outside kernels: the memory hooks are off then
  Fiber scheduler;
  void (*body)(void*) = nullptr;
  void* context = nullptr;
  bool failed = false;
  std::string report;
  uint64_t random_state = 1;
  uint32_t block_serial = 0;  // of all launches; never 0 inside a kernel
  uint32_t block_epoch = 0;   // grows at every block start and block barrier
  uint32_t launch_serial = 0;
  Dim3 block_index;
  size_t dynamic_limit = 0;  // of shared memory, that the kernel has asked for; 0: it has not
  // shared memory of the running block
  unsigned char* shared = nullptr;
  size_t shared_used = 0;
  std::vector<Region> regions;
};

extern Machine machine;
extern std::mutex one_at_a_time;  // of launches and of changes to the tensors

constexpr size_t kSharedLimit =
    227 * 1024;  // what one block may ask for on sm_90; the sum of all its arrays
constexpr size_t kSharedWithoutOptIn = 48 * 1024;
constexpr const char* kHowToOptIn =
    "; a kernel asks for more by cudaFuncSetAttribute(kernel, "
    "cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)";
constexpr size_t kRedZone = 256;
constexpr unsigned char kPoison = 0xff, kRedByte = 0xfd;

// launches.cpp
size_t dynamic_limit(const void* kernel);  // what allow_shared gave; 0: nothing
void note_launch(const void* kernel, Dim3 grid, Dim3 block, size_t shared_bytes);

uint64_t random_bits();
void yield();  // back to the scheduler

// Waits until every lane of mask has called with the same name; execute(meeting) runs once.
void meet(const char* name, unsigned mask, void* operand, void (*execute)(Meeting&, Warp&));

// memory.cpp
void start_block_memory(size_t shared_bytes);
void finish_block_memory();   // red zones, unfinished copies
void finish_launch_memory();  // red zones of the tensors
bool in_shared(const void* p);
void check_access(const void* p, size_t bytes, bool write, size_t align, const char* what);
const char* describe(const void* p);  // "shared memory + 12 bytes", for reports; a static buffer

// race.cpp in the race build, no-ops in the fast one
void note_read(const void* p, size_t bytes);
void note_write(const void* p, size_t bytes);
void check_future_write(const void* p, size_t bytes);  // an asynchronous write may land from now on
bool tensor_range(const void* p, size_t bytes);        // inside one tensor
bool in_arena(const void* p);
const unsigned char* arena_base();
size_t arena_bytes();

}  // namespace simt

// A SIMT machine in miniature: runs CUDA-style kernels on one CPU thread, one fiber per CUDA thread, and says in words
// what a kernel did wrong. Knows nothing of its users; docs/kernels.md tells how to write a kernel for it.
//
//   grid -> blocks, one after another -> warps of 32 -> lanes (fibers)
//
// One warp runs until all its lanes wait; then the policy picks the next. The first mistake stops the launch, and
// launch() returns its text; nullptr means that all was well. Not a model of speed; threads take turns, a launch each.
#pragma once

#include <cstddef>
#include <cstdint>

namespace simt {

struct Dim3 {
  unsigned x, y, z;
  constexpr Dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
  constexpr uint64_t count() const { return static_cast<uint64_t>(x) * y * z; }
};

// ---- how a launch is run ---------------------------------------------------------------------------------------------

enum class Order : int {
  kAscending,    // blocks, warps and lanes in order
  kDescending,   // all three backwards
  kRandom,       // by seed, drawn anew at each turn
  kInterleaved,  // by seed, and the warp changes after every collective
};

enum class Copies : int {
  kLate,   // cp.async data arrive only at the wait: a missing wait reads poison
  kEarly,  // at the issue: a missing barrier before the issue overwrites what others still read
  kMixed,  // each copy by seed
};

enum class Cores : int {
  kAmpere,  // tensor cores of sm_80 to sm_89; csrc/simt/tensor_core.h has the arithmetic
  kHopper,  // of sm_90 to sm_120
};

struct Policy {
  Order order = Order::kAscending;
  Copies copies = Copies::kLate;
  uint64_t seed = 1;
  Cores cores = Cores::kAmpere;
};

void set_policy(const Policy& policy);

// ---- memory that kernels may touch -----------------------------------------------------------------------------------

// A tensor between red zones, aligned to 256 bytes and filled with poison (0xff, a NaN in every float format) up to
// 64 MiB; beyond, zero pages that cost memory only where touched. Checked accesses must stay inside one tensor.
void* allocate(size_t bytes);
void free(void* tensor);
void free_all();

struct Counters {
  uint64_t launches, blocks, switches, collectives, mmas,
      bank_conflicts,  // extra ldmatrix passes
      copies;          // cp.async that read a tensor
};
const Counters& counters();
void reset_counters();

// ---- launch ----------------------------------------------------------------------------------------------------------

// Runs body(context) once per thread. Most callers want launch() below. kernel: whose launch it is.
const char* run_grid(const void* kernel, Dim3 grid, Dim3 block, size_t shared_bytes,
                     void (*body)(void*), void* context);

// kernel(args...), as kernel<<<grid, block, shared_bytes>>>(args...) would. Returns what went wrong, or nullptr; the
// text lives until the next launch.
template <typename... Params, typename... Args>
const char* launch(Dim3 grid, Dim3 block, size_t shared_bytes, void (*kernel)(Params...),
                   const Args&... args) {
  auto call = [&] { kernel(args...); };
  using Call = decltype(call);
  return run_grid(
      reinterpret_cast<const void*>(kernel), grid, block, shared_bytes,
      [](void* context) { (*static_cast<Call*>(context))(); }, &call);
}

// Lets the kernel have more than 48 KiB of dynamic shared memory, as the device wants to be asked. False where
// no block may have so much.
bool allow_shared(const void* kernel, size_t bytes);

// The stream that launches by cudaLaunchKernelEx must name; nullptr: any.
extern const void* current_stream;

// What was launched since record_launches(true). Names are those that the library exports, demangled.
struct LaunchRecord {
  const char* kernel;
  Dim3 grid, block;
  size_t shared_bytes;
};
void record_launches(bool on);
size_t n_launches();
const LaunchRecord& launch_record(size_t index);

// ---- what a kernel sees ----------------------------------------------------------------------------------------------

struct ThreadView {
  Dim3 thread, block, block_dim, grid_dim;
};
extern ThreadView* current_view;  // of the running thread

// Stops the launch with this text (printf rules), prefixed with the kernel's place. Never returns.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

void sync_threads();
int sync_threads_count(int predicate);
void sync_warp(unsigned mask);
uint32_t shuffle(unsigned mask, uint32_t value, int lane, int width,
                 const char* name);  // absolute lane in the segment
uint32_t shuffle_xor(unsigned mask, uint32_t value, int bits, int width);
uint32_t shuffle_up(unsigned mask, uint32_t value, int delta, int width);
uint32_t shuffle_down(unsigned mask, uint32_t value, int delta, int width);
unsigned ballot(unsigned mask, int predicate);
unsigned match_any(unsigned mask, uint32_t value);

// Dynamic shared memory of the block, and a static array found by its key (one per declaration).
void* dynamic_shared();
void* static_shared(const void* key, size_t bytes, size_t align);

// Checked accesses to a tensor or to shared memory, aligned to their size.
void load(void* to, const void* from, size_t bytes);
void store(void* to, const void* from, size_t bytes);
template <size_t kBytes>
void load_bytes(void* to, const void* from) {
  load(to, from, kBytes);
}
template <size_t kBytes>
void store_bytes(void* to, const void* from) {
  store(to, from, kBytes);
}
void atomic_access(
    void* p, size_t bytes);  // the check of an atomic; the caller then does the operation plainly

// Asynchronous copies, tensor to shared memory; source_bytes < bytes fills the rest with zeros.
void copy_async(void* shared, const void* global, size_t bytes, size_t source_bytes);
void copy_async_commit();
void copy_async_wait(int groups_left);

// Warp-wide matrix instructions with the fragment layouts of the PTX ISA.
void ldmatrix(uint32_t* out, const void* row, int n_matrices, bool transposed);
enum class MmaType { kBf16, kHalf };
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  const float (&c)[4], MmaType type);
void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                      const float (&c)[4]);

}  // namespace simt

// One static shared array per declaration; its block's copy is poisoned and lies between red zones.
#define SIMT_SHARED(Type, name, count)   \
  static char name##_key;                \
  Type* const name = static_cast<Type*>( \
      ::simt::static_shared(&name##_key, sizeof(Type) * (count), alignof(Type)))
#define SIMT_DYNAMIC_SHARED(name) \
  unsigned char* const name = static_cast<unsigned char*>(::simt::dynamic_shared())

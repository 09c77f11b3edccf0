// Picks a target once, from what was compiled in, what the machine can run, and $WGPT_CPU_TARGET.
#include "kernels/cpu/dispatch/exported.h"
#include "kernels/out_of_memory.h"

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <string_view>

namespace wgpt::cpu {

[[noreturn]] void throw_out_of_memory(size_t n_bytes);

namespace generic {
extern const Kernels kKernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
namespace avx512_bf16 {
extern const Kernels kKernels;
}
namespace amx {
extern const Kernels kKernels;
}
#elif defined(__aarch64__)
namespace neon {
extern const Kernels kKernels;
}
#endif

namespace {

constexpr int kMaxTargets = 5;

#if defined(__x86_64__)
// Linux grants a process the AMX tile registers only on request: arch_prctl(ARCH_REQ_XCOMP_PERM,
// XFEATURE_XTILEDATA).
bool may_use_amx() {
#if defined(__linux__)
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return false;
#endif
}
#endif

// __builtin_cpu_supports also asks whether the operating system saves the wide registers.
struct Available {
  const Kernels* targets[kMaxTargets + 1] = {};
  int n = 0;

  Available() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                          __builtin_cpu_supports("f16c");
    const bool has_avx512 =
        has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool has_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
    if (has_bf16 && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
        may_use_amx()) {
      targets[n++] = &amx::kKernels;
    }
    // vdpbf16ps gives twice the rate of float32 on AMD, half of it on Intel (measured: Zen 5,
    // Sapphire Rapids).
    const bool is_slow = __builtin_cpu_is("intel");
    if (has_bf16 && !is_slow) targets[n++] = &avx512_bf16::kKernels;
    if (has_avx512) targets[n++] = &avx512::kKernels;
    if (has_bf16 && is_slow) targets[n++] = &avx512_bf16::kKernels;
    if (has_avx2) targets[n++] = &avx2::kKernels;
#elif defined(__aarch64__)
    targets[n++] = &neon::kKernels;
#endif
    targets[n++] = &generic::kKernels;
  }
};

const Available& available_targets() {
  static const Available available;
  return available;
}

const Kernels& find(std::string_view name) {
  const Available& available = available_targets();
  if (name.empty()) return *available.targets[0];
  std::string names;
  for (int i = 0; i < available.n; ++i) {
    if (name == available.targets[i]->target) return *available.targets[i];
    names += (i > 0 ? ", " : "") + std::string(available.targets[i]->target);
  }
  throw std::invalid_argument("WGPT_CPU_TARGET must be one of " + names +
                              " on this machine, got '" + std::string(name) + "'");
}

std::atomic<const Kernels*> g_active{nullptr};

}  // namespace

const Kernels* const* available() { return available_targets().targets; }

const Kernels& active() {
  const Kernels* kernels = g_active.load(std::memory_order_acquire);
  if (kernels == nullptr) {
    const char* forced = std::getenv("WGPT_CPU_TARGET");
    kernels = &find(forced == nullptr ? "" : forced);
    g_active.store(kernels, std::memory_order_release);
  }
  return *kernels;
}

void set_active(const char* target) {
  g_active.store(&find(target == nullptr ? "" : target), std::memory_order_release);
}

void throw_out_of_memory(size_t n_bytes) {
  throw OutOfMemory("out of memory on cpu: a thread's scratch needs " + std::to_string(n_bytes) +
                    " bytes. Lower the batch size or the length");
}

double peak_flops(DType dtype) {
  constexpr int64_t kBlocks = 40000;  // 0.1 to 0.5 ms, so that some runs are not interrupted
  double best = 0;
  for (int i = 0; i < 60; ++i) {
    const auto start = std::chrono::steady_clock::now();
    const double flops = active().run_fmas(dtype, kBlocks);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    best = std::max(best, flops / seconds.count());
  }
  return best;
}

}  // namespace wgpt::cpu

// GEMM driver: packing, cache blocking, threads. The formula: kernels/gemm.h; the kernels on packed panels:
// gemm_amx_fp32.h, gemm_vector.h; prepacked b and few rows: gemm_prepacked.h.
//
//   for each k slice (all of k, where packed b is kept for several calls)
//     the shared operand packed, by all threads                 in the workspace
//     task = a chunk of the panels of the other operand, private to the task
//       for each k block of the slice                           private panels packed, in L2, or in place
//         for each group of shared panels   private panels times these
//
// Shared is the smaller operand: panels that one thread packs and another reads move between their caches.
// A panel is some rows of a or columns of b.
#pragma once

#include "kernels/cpu/gemm/gemm_amx_fp32.h"
#include "kernels/cpu/gemm/gemm_prepacked.h"
#include "kernels/cpu/gemm/gemm_vector.h"
#include "kernels/cpu/threads/tasks.h"

namespace wgpt::cpu::WGPT_TARGET {

// kPrivateRows: tasks have private rows of a and share b, else private columns of b and share a.
template <typename Kernel, bool kPrivateRows>
class GemmDriver {
  using Element = typename Kernel::Element;
  static constexpr int64_t kKBlockDepth = Kernel::kKBlockDepth, kStepDepth = Kernel::kStepDepth,
                           kPrivate = Kernel::template kPanel<kPrivateRows>,
                           kShared = Kernel::template kPanel<!kPrivateRows>,
                           kPrivateFloats = Kernel::template kFloatsPerDepth<kPrivateRows>,
                           kSharedFloats = Kernel::template kFloatsPerDepth<!kPrivateRows>;

 public:
  GemmDriver(const Gemm& args, const Executor& executor)
      : args_(args),
        executor_(executor),
        private_(kPrivateRows ? rows_of_a() : columns_of_b()),
        shared_(kPrivateRows ? columns_of_b() : rows_of_a()),
        n_private_(ceil_div(private_.n_outer, kPrivate)),
        n_shared_(ceil_div(shared_.n_outer, kShared)),
        shared_packed_(static_cast<float*>(args.workspace)) {
    // As many chunks as make equal rounds for the threads; with fewer chunks than threads, the shared panels
    // are divided into groups too.
    const int64_t n_threads = max_of(1, executor.n_threads);
    const int64_t n_rounds =
        ceil_div(n_private_, Kernel::template kPrivatePanels<kPrivateRows> * n_threads);
    n_chunks_ = min_of(n_private_, n_rounds * n_threads);
    n_groups_ = min_of(n_shared_, ceil_div(n_threads, n_chunks_));
  }

  static size_t workspace_bytes(const Gemm& args) {
    const int64_t n = ceil_div(kPrivateRows ? args.n : args.m, kShared);
    const int64_t depth = round_up(min_of(args.k, k_slice_depth(args)), kStepDepth);
    return static_cast<size_t>(n * depth * kSharedFloats) * sizeof(float);
  }

  // Returns false where some element of c is not finite and the kernel cannot tell what it should be.
  bool run() {
    const int64_t depth = k_slice_depth(args_);
    for (int64_t begin = 0; begin < args_.k; begin += depth) {
      const Span k_slice{begin, begin + min_of(depth, args_.k - begin)};
      if (args_.b_packing != Packing::kPackedBefore) pack_shared(k_slice);
      run_tasks(executor_, n_chunks_ * n_groups_, [&](int64_t task) { run_task(task, k_slice); });
    }
    return all_finite_;
  }

 private:
  Operand<Element> rows_of_a() const {
    return {static_cast<const Element*>(args_.a), args_.a_row, args_.a_column, args_.m, args_.k};
  }
  Operand<Element> columns_of_b() const {
    return {static_cast<const Element*>(args_.b), args_.b_column, args_.b_row, args_.n, args_.k};
  }

  // Depth of a k slice: what is packed between two barriers.
  static int64_t k_slice_depth(const Gemm& args) {
    return args.b_packing == Packing::kPackPerCall ? Kernel::kKSliceDepth : args.k;
  }

  static int64_t n_steps_of(int64_t begin, int64_t end) {
    return ceil_div(min_of(end - begin, kKBlockDepth), kStepDepth);
  }

  // The i-th of n_splits even splits of n panels.
  static Span split_evenly(int64_t n, int64_t n_splits, int64_t i) {
    return {n * i / n_splits, n * (i + 1) / n_splits};
  }

  // Shared panels of the k block that starts at k_block.
  float* shared_k_block(const Span& k_slice, int64_t k_block) const {
    return shared_packed_ + n_shared_ * (k_block - k_slice.begin) * kSharedFloats;
  }

  // In the order in which the operand lies in memory.
  void pack_shared(const Span& k_slice) {
    const auto pack = [&](int64_t k_block, Span panels, Span steps) {
      Kernel::template pack<!kPrivateRows>(shared_, 0, k_block, n_steps_of(k_block, k_slice.end),
                                           panels, steps, shared_k_block(k_slice, k_block));
    };
    if (shared_.depth == 1) {
      run_tasks(executor_, n_shared_, [&](int64_t panel) {
        for (int64_t k_block = k_slice.begin; k_block < k_slice.end; k_block += kKBlockDepth)
          pack(k_block, {panel, panel + 1}, {0, n_steps_of(k_block, k_slice.end)});
      });
    } else {
      run_tasks(executor_, ceil_div(k_slice.size(), kStepDepth), [&](int64_t step) {
        const int64_t k_block = step * kStepDepth / kKBlockDepth * kKBlockDepth;
        const int64_t step_in_block = step - k_block / kStepDepth;
        pack(k_slice.begin + k_block, {0, n_shared_}, {step_in_block, step_in_block + 1});
      });
    }
  }

  void run_task(int64_t task, const Span& k_slice) {
    const Span private_span = split_evenly(n_private_, n_chunks_, task / n_groups_),
               shared_span = split_evenly(n_shared_, n_groups_, task % n_groups_);
    const Span rows = (kPrivateRows ? private_span : shared_span),
               columns = (kPrivateRows ? shared_span : private_span);
    bool in_place = false;
    if constexpr (kPrivateRows && Kernel::kReadsInPlace)
      in_place = Kernel::reads_in_place(private_);
    const int64_t private_floats = in_place ? 0
                                            : private_span.size() *
                                                  n_steps_of(k_slice.begin, k_slice.end) *
                                                  kStepDepth * kPrivateFloats;
    const int64_t accumulator_floats = Kernel::accumulator_floats(args_, rows, columns);
    auto* private_packed = static_cast<float*>(
        thread_scratch(static_cast<size_t>(private_floats + accumulator_floats) * sizeof(float)));
    Kernel kernel(args_, rows, columns, private_packed + private_floats);
    for (int64_t k_block = k_slice.begin; k_block < k_slice.end; k_block += kKBlockDepth) {
      const int64_t n_steps = n_steps_of(k_block, k_slice.end);
      const int64_t private_panel = n_steps * kStepDepth * kPrivateFloats,
                    shared_panel = n_steps * kStepDepth * kSharedFloats;
      Panels private_panels{private_packed, private_panel, private_span};
      if (!in_place) {
        Kernel::template pack<kPrivateRows>(private_, private_span.begin * kPrivate, k_block,
                                            n_steps, {0, private_span.size()}, {0, n_steps},
                                            private_packed);
      } else if constexpr (Kernel::kReadsInPlace) {
        private_panels = Kernel::in_place(private_, private_span, k_block);
      }
      const KBlock here{min_of(kKBlockDepth, k_slice.end - k_block), n_steps, k_block == 0,
                        k_block + kKBlockDepth >= args_.k};
      constexpr int64_t kGroup = Kernel::template kSharedPanels<!kPrivateRows>;
      for (int64_t j = shared_span.begin; j < shared_span.end; j += kGroup) {
        const Panels shared_panels{shared_k_block(k_slice, k_block) + j * shared_panel,
                                   shared_panel,
                                   {j, min_of(j + kGroup, shared_span.end)}};
        kernel.template accumulate<kPrivateRows>(kPrivateRows ? private_panels : shared_panels,
                                                 kPrivateRows ? shared_panels : private_panels,
                                                 here);
      }
    }
    if (!kernel.finish()) __atomic_store_n(&all_finite_, false, __ATOMIC_RELAXED);
  }

  const Gemm& args_;
  const Executor& executor_;
  const Operand<Element> private_, shared_;
  const int64_t n_private_, n_shared_;
  float* const shared_packed_;
  int64_t n_chunks_, n_groups_;
  bool all_finite_ = true;
};

// Whether our GEMM beats torch's for types that torch has instructions for.
inline bool is_large(const Gemm& args) {
#if defined(__AMX_BF16__)
  // Measured, two threads, ours and torch's: 256 x 256 x 256 90 and 87 us, 512 x 256 x 256 130 and 164,
  // 64 x 128 x 128 19 and 10.
  constexpr int64_t kLeastWork = int64_t{1} << 25;
#else
  // Measured, two threads of a Zen 3, torch's time over ours: 64 x 128 x 128 0.92, 256 x 256 x 256 0.97,
  // 32 x 1024 x 256 1.33.
  constexpr int64_t kLeastWork = int64_t{1} << 23;
#endif
  return args.m >= 32 && args.n >= 32 && args.m * args.n * args.k >= kLeastWork;
}

// bfloat16 and float16: also small GEMMs where torch has no instructions for them, since it then takes tens
// of times as long as for float32. On AMX, torch's (oneDNN) run. Empty GEMMs are torch's too.
inline bool prefers_own_gemm(const Gemm& args) {
  if (args.m == 0 || args.n == 0 || args.k == 0) return false;
  switch (args.dtype) {
    case DType::kFloat32:
      return kLanes >= 8 && is_large(args);
    case DType::kBFloat16:
      if (DotOf<BFloat16>::Type::kIsAmx) return false;
      return kLanes >= 8 && (DotOf<BFloat16>::Type::kPerUnit == 1 || is_large(args));
    case DType::kFloat16:
      return kLanes >= 8 && !DotOf<BFloat16>::Type::kIsAmx;
    case DType::kFloat64:
      return false;
  }
  return false;
}

#if defined(__AMX_BF16__)
template <typename Element>
using GemmKernelOf = AmxFp32Gemm;
#else
template <typename Element>
using GemmKernelOf = VectorGemm<Element>;
#endif

template <typename T>
struct Type {
  using type = T;
};

// Calls body(Type<T>{}) for the GemmDriver of the dtype; the larger operand is private.
template <typename Body>
inline auto with_gemm(const Gemm& args, Body&& body) {
  const bool private_rows = args.b_packing != Packing::kPackPerCall || args.m >= args.n;
  const auto of = [&](auto e) {
    using Kernel = GemmKernelOf<decltype(e)>;
    return private_rows ? body(Type<GemmDriver<Kernel, true>>{})
                        : body(Type<GemmDriver<Kernel, false>>{});
  };
#if !defined(__AMX_BF16__)
  if (args.dtype == DType::kBFloat16) return of(BFloat16{});
  if (args.dtype == DType::kFloat16) return of(Float16{});
#endif
  return of(float{});
}

inline bool gemm(const Gemm& args, const Executor& executor) {
  if (args.b_packing == Packing::kPrepacked) {
    run_prepacked_gemm(args, executor);
    return true;
  }
  return with_gemm(
      args, [&](auto driver) { return typename decltype(driver)::type(args, executor).run(); });
}

inline size_t gemm_workspace_bytes(const Gemm& args) {
  if (args.b_packing == Packing::kPrepacked) return 0;
  return with_gemm(args,
                   [&](auto driver) { return decltype(driver)::type::workspace_bytes(args); });
}

}  // namespace wgpt::cpu::WGPT_TARGET

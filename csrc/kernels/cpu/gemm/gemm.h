// The way through a matmul: packing, blocks and threads. What is computed: kernels/matmul.h; how blocks of
// packed panels are multiplied: gemm_amx.h (AMX), gemm_vector.h.
//
//   for each piece of k (or once for all of k, where b is kept for several products)
//     the shared operand packed, by threads                     in the workspace
//     task = a chunk of the other one, its own
//       for each block of the piece                             its own packed, in L2, or where it lies
//         for each group of shared panels   all products of its own and these
//
// Shared is the smaller operand: what one thread has packed and another reads crosses between their
// caches. A panel is some rows of a or columns of b.
#pragma once

#include "kernels/cpu/gemm/gemm_amx.h"
#include "kernels/cpu/gemm/gemm_vector.h"
#include "kernels/cpu/threads/tasks.h"

namespace wgpt::cpu::WGPT_TARGET {

// kOwnRows: tasks own rows of a and share b, else they own columns of b and share a.
template <typename Product, bool kOwnRows>
class MatmulBy {
  using Element = typename Product::Element;
  static constexpr int64_t kBlockDepth = Product::kBlockDepth, kStepDepth = Product::kStepDepth,
                           kOwn = Product::template kPanel<kOwnRows>,
                           kShared = Product::template kPanel<!kOwnRows>,
                           kOwnFloats = Product::template kFloatsPerDepth<kOwnRows>,
                           kSharedFloats = Product::template kFloatsPerDepth<!kOwnRows>;

 public:
  MatmulBy(const Matmul& args, const Executor& executor)
      : args_(args),
        executor_(executor),
        own_(kOwnRows ? rows_of_a() : columns_of_b()),
        shared_(kOwnRows ? columns_of_b() : rows_of_a()),
        n_own_(ceil_div(own_.n_outer, kOwn)),
        n_shared_(ceil_div(shared_.n_outer, kShared)),
        shared_packed_(static_cast<float*>(args.workspace)) {
    // Chunks are as even as threads; with fewer of them than threads a task has some of the shared
    // panels.
    const int64_t n_threads = max_of(1, executor.n_threads);
    const int64_t n_rounds = ceil_div(n_own_, Product::template kOwnPanels<kOwnRows> * n_threads);
    n_chunks_ = min_of(n_own_, n_rounds * n_threads);
    n_groups_ = min_of(n_shared_, ceil_div(n_threads, n_chunks_));
  }

  static size_t workspace_bytes(const Matmul& args) {
    const int64_t n = ceil_div(kOwnRows ? args.n : args.m, kShared);
    const int64_t depth = round_up(min_of(args.k, depth_at_once(args)), kStepDepth);
    return static_cast<size_t>(n * depth * kSharedFloats) * sizeof(float);
  }

  // Gives false where c should be made by another implementation.
  bool run() {
    const int64_t depth = depth_at_once(args_);
    for (int64_t begin = 0; begin < args_.k; begin += depth) {
      const Span piece{begin, begin + min_of(depth, args_.k - begin)};
      if (args_.b_packing != Packing::kKept) pack_shared(piece);
      run_tasks(executor_, n_chunks_ * n_groups_, [&](int64_t task) { multiply(task, piece); });
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

  // The piece of k that is packed between two waits for all threads.
  static int64_t depth_at_once(const Matmul& args) {
    return args.b_packing == Packing::kByBlocks ? Product::kDepthAtOnce : args.k;
  }

  static int64_t steps_of(int64_t begin, int64_t end) {
    return ceil_div(min_of(end - begin, kBlockDepth), kStepDepth);
  }

  // The i-th of n_parts parts of n panels, as even as can be.
  static Span part(int64_t n, int64_t n_parts, int64_t i) {
    return {n * i / n_parts, n * (i + 1) / n_parts};
  }

  // Where the shared panels of the block from `block` on begin.
  float* shared_block(const Span& piece, int64_t block) const {
    return shared_packed_ + n_shared_ * (block - piece.begin) * kSharedFloats;
  }

  // In the order in which the operand lies in memory.
  void pack_shared(const Span& piece) {
    const auto pack = [&](int64_t block, Span panels, Span steps) {
      Product::template pack<!kOwnRows>(shared_, 0, block, steps_of(block, piece.end), panels,
                                        steps, shared_block(piece, block));
    };
    if (shared_.depth == 1) {
      run_tasks(executor_, n_shared_, [&](int64_t panel) {
        for (int64_t block = piece.begin; block < piece.end; block += kBlockDepth)
          pack(block, {panel, panel + 1}, {0, steps_of(block, piece.end)});
      });
    } else {
      run_tasks(executor_, ceil_div(piece.size(), kStepDepth), [&](int64_t step) {
        const int64_t block = step * kStepDepth / kBlockDepth * kBlockDepth;
        const int64_t own = step - block / kStepDepth;
        pack(piece.begin + block, {0, n_shared_}, {own, own + 1});
      });
    }
  }

  void multiply(int64_t task, const Span& piece) {
    const Span own = part(n_own_, n_chunks_, task / n_groups_),
               shared = part(n_shared_, n_groups_, task % n_groups_);
    const Span rows = (kOwnRows ? own : shared), columns = (kOwnRows ? shared : own);
    bool in_place = false;
    if constexpr (kOwnRows && Product::kReadsInPlace) in_place = Product::reads_in_place(own_);
    const int64_t own_floats =
        in_place ? 0 : own.size() * steps_of(piece.begin, piece.end) * kStepDepth * kOwnFloats;
    const int64_t sums_floats = Product::sums_floats(args_, rows, columns);
    auto* own_packed = static_cast<float*>(
        thread_scratch(static_cast<size_t>(own_floats + sums_floats) * sizeof(float)));
    Product product(args_, rows, columns, own_packed + own_floats);
    for (int64_t block = piece.begin; block < piece.end; block += kBlockDepth) {
      const int64_t n_steps = steps_of(block, piece.end);
      const int64_t own_panel = n_steps * kStepDepth * kOwnFloats,
                    shared_panel = n_steps * kStepDepth * kSharedFloats;
      Panels mine{own_packed, own_panel, own};
      if (!in_place) {
        Product::template pack<kOwnRows>(own_, own.begin * kOwn, block, n_steps, {0, own.size()},
                                         {0, n_steps}, own_packed);
      } else if constexpr (Product::kReadsInPlace) {
        mine = Product::in_place(own_, own, block);
      }
      const Block here{min_of(kBlockDepth, piece.end - block), n_steps, block == 0,
                       block + kBlockDepth >= args_.k};
      constexpr int64_t kGroup = Product::template kSharedPanels<!kOwnRows>;
      for (int64_t j = shared.begin; j < shared.end; j += kGroup) {
        const Panels others{shared_block(piece, block) + j * shared_panel,
                            shared_panel,
                            {j, min_of(j + kGroup, shared.end)}};
        product.template multiply<kOwnRows>(kOwnRows ? mine : others, kOwnRows ? others : mine,
                                            here);
      }
    }
    if (!product.finish()) __atomic_store_n(&all_finite_, false, __ATOMIC_RELAXED);
  }

  const Matmul& args_;
  const Executor& executor_;
  const Operand<Element> own_, shared_;
  const int64_t n_own_, n_shared_;
  float* const shared_packed_;
  int64_t n_chunks_, n_groups_;
  bool all_finite_ = true;
};

// Whether products for which torch has instructions are better made here.
inline bool is_large(const Matmul& args) {
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

// For bfloat16 and float16 also small ones where torch has no instructions for them: it then takes tens of
// times as long as for float32. Where it has a matrix unit, torch's are. Empty ones are torch's too.
inline bool prefers_own_gemm(const Matmul& args) {
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
using ProductOf = TileProduct;
#else
template <typename Element>
using ProductOf = VectorProduct<Element>;
#endif

template <typename T>
struct Type {
  using type = T;
};

// Calls body(Type<T>{}) for the MatmulBy whose type and owner suit args.
template <typename Body>
inline auto with_matmul(const Matmul& args, Body&& body) {
  const bool owns_rows = args.b_packing != Packing::kByBlocks || args.m >= args.n;
  const auto of = [&](auto e) {
    using Product = ProductOf<decltype(e)>;
    return owns_rows ? body(Type<MatmulBy<Product, true>>{})
                     : body(Type<MatmulBy<Product, false>>{});
  };
#if !defined(__AMX_BF16__)
  if (args.dtype == DType::kBFloat16) return of(BFloat16{});
  if (args.dtype == DType::kFloat16) return of(Float16{});
#endif
  return of(float{});
}

inline bool matmul(const Matmul& args, const Executor& executor) {
  return with_matmul(args,
                     [&](auto by) { return typename decltype(by)::type(args, executor).run(); });
}

inline size_t matmul_workspace_bytes(const Matmul& args) {
  return with_matmul(args, [&](auto by) { return decltype(by)::type::workspace_bytes(args); });
}

}  // namespace wgpt::cpu::WGPT_TARGET

// linear_cross_entropy's rows on CUDA, between cuBLAS's GEMMs. Formulas in kernels/linear_cross_entropy.h. Not yet run on
// hardware.
//
//   rows   one warp per row: its largest logit and where it is first, the sum of exponentials, loss and gradient in place.
//          A row is taken in turns of 32 lanes x kHeld vectors; one of a single turn (1152 logits in float32, 1280 in the
//          16-bit types) stays in registers, a longer one is read three times.
//   sums   one block: the losses in float64 and the hits of all rows, each thread's own in ascending order, then a tree
//
// A target outside [0, V) that is not ignore_index makes loss and gradient of its row NaN; a check would wait for the
// device. Rows may be padded to whole 16-byte vectors, as GEMMs like them; what is in the padding does not matter.
//
// Bytes: reads and writes each logit once. Memory-bound, the limit is a copy: 6000 x 1025 in bfloat16 are 25 MB, 5.7 us at
// 4.3 TB/s.
#pragma once

#include "kernels/cuda/any_type.cuh"
#include "kernels/cuda/launch.h"

namespace wgpt::cuda {
namespace cross_entropy {

constexpr int kWarps = 8;  // of a block, one row each
constexpr int kSumThreads = 1024;

// A logit and where it stands; of equals the first is the larger.
struct Largest {
  float value;
  int at;
};

WGPT_DEVICE Largest larger(Largest a, Largest b) {
  return b.value > a.value || (b.value == a.value && b.at < a.at) ? b : a;
}

// 16-byte vectors of a row that a lane keeps in registers: more would cost a resident block.
template <typename T>
constexpr int kHeldOf = sizeof(T) == 4 ? 9 : 5;

template <typename T, int W>
__global__ void __launch_bounds__(kWarps* kWarp, 2) rows_kernel(CrossEntropyRows a) {
  constexpr int kHeld = kHeldOf<T>, kTurn = kWarp * W * kHeld;
  const int lane = threadIdx.x % kWarp, vocab = static_cast<int>(a.vocab);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (row >= a.rows) return;
  T* logits = static_cast<T*>(a.logits) + row * a.row_stride;
  float* loss = static_cast<float*>(a.loss);
  const int64_t target = a.targets[row];
  const bool scored = target != a.ignore_index, known = target >= 0 && target < a.vocab;
  const int n_turns = ceil_div(vocab, kTurn);
  Vec<T, W> x[kHeld];
  const auto column = [&](int turn, int i) { return turn * kTurn + (i * kWarp + lane) * W; };
  const auto load_turn = [&](int turn) {
    WGPT_UNROLL
    for (int i = 0; i < kHeld; ++i) {
      if (column(turn, i) < vocab) x[i] = load_vec<W>(logits + column(turn, i));
    }
  };
  // f(i, first index) for each vector of the row, a turn at a time.
  const auto for_each = [&](bool held, const auto& f) {
    for (int turn = 0; turn < n_turns; ++turn) {
      if (!held) load_turn(turn);
      WGPT_UNROLL
      for (int i = 0; i < kHeld; ++i) {
        if (column(turn, i) < vocab) f(i, column(turn, i));
      }
    }
  };

  Largest largest = {-INFINITY, vocab};
  float chosen = 0.f, sum = 0.f;
  bool is_mine = false;  // the target
  if (scored) {
    for_each(false, [&](int i, int at) {
      WGPT_UNROLL
      for (int k = 0; k < W; ++k) {
        const float value = to_float(x[i].e[k]);
        if (at + k < vocab && value > largest.value) largest = {value, at + k};
        if (known && at + k == target) {
          chosen = value;
          is_mine = true;
        }
      }
    });
    WGPT_UNROLL
    for (int step = kWarp / 2; step > 0; step /= 2) {
      largest = larger(largest, {__shfl_xor_sync(kFullWarp, largest.value, step),
                                 __shfl_xor_sync(kFullWarp, largest.at, step)});
    }
    for_each(n_turns == 1, [&](int i, int at) {
      WGPT_UNROLL
      for (int k = 0; k < W; ++k) {
        if (at + k < vocab) sum += expf(to_float(x[i].e[k]) - largest.value);
      }
    });
    sum = warp_sum(sum);
  }
  const float nan = __uint_as_float(0x7fffffffu);
  if (is_mine) {
    loss[row] = logf(sum) + (largest.value - chosen);
    a.correct[row] = largest.at == target;
  } else if (lane == 0 && !(scored && known)) {
    loss[row] = scored ? nan : 0.f;
    a.correct[row] = 0;
  }
  if (!a.gradients) return;
  const float scale = known ? 1.f / sum : nan;
  for_each(n_turns == 1 && scored, [&](int i, int at) {
    WGPT_UNROLL
    for (int k = 0; k < W; ++k) {
      float d = 0.f;
      if (scored && at + k < vocab) {
        d = expf(to_float(x[i].e[k]) - largest.value) * scale - (at + k == target ? 1.f : 0.f);
      }
      x[i].e[k] = from_float<T>(d);
    }
    store_vec<W>(logits + at, x[i]);
  });
}

__global__ void __launch_bounds__(kSumThreads) sums_kernel(CrossEntropySums a) {
  WGPT_SHARED(double, losses, kSumThreads);
  WGPT_SHARED(int, hits, kSumThreads);
  const int at = threadIdx.x;
  double sum = 0;
  int count = 0;
  WGPT_UNROLL_BY(4)
  for (int64_t i = at; i < a.rows; i += kSumThreads) {
    sum += a.loss[i];
    count += a.correct[i];
  }
  losses[at] = sum;
  hits[at] = count;
  for (int half = kSumThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (at < half) {
      losses[at] += losses[at + half];
      hits[at] += hits[at + half];
    }
  }
  if (at == 0) {
    *a.total = static_cast<float>(losses[0]);
    *a.n_correct = hits[0];
  }
}

}  // namespace cross_entropy

int64_t cross_entropy_row_stride(DType dtype, int64_t vocab) {
  const int64_t lanes = dtype == DType::kFloat32 ? 4 : 8;
  return ceil_div(vocab, lanes) * lanes;
}

const char* cross_entropy_rows(const CrossEntropyRows& a, Stream stream) {
  if (a.vocab > INT32_MAX / 2) return "linear_cross_entropy: more than 2^30 entries";
  if (a.rows > INT32_MAX) return "linear_cross_entropy: more than 2^31 - 1 rows";
  const char* error = nullptr;
  if (a.rows == 0) return error;
  const dim3 grid(static_cast<unsigned>(ceil_div(a.rows, int64_t{cross_entropy::kWarps})));
  constexpr int kThreads = cross_entropy::kWarps * kWarp;
  const bool known = with_element_type(a.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kW = kVecLanes<T>;
    error = a.row_stride % kW == 0 && aligned16(a.logits)
                ? launch(cross_entropy::rows_kernel<T, kW>, grid, kThreads, 0, stream, a)
                : launch(cross_entropy::rows_kernel<T, 1>, grid, kThreads, 0, stream, a);
  });
  return known ? error : "linear_cross_entropy: CUDA knows float32, bfloat16 and float16";
}

const char* cross_entropy_sums(const CrossEntropySums& a, Stream stream) {
  return launch(cross_entropy::sums_kernel, 1, cross_entropy::kSumThreads, 0, stream, a);
}

}  // namespace wgpt::cuda

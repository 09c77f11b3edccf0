// CPU targets' kernels under AddressSanitizer and UBSan: `make sanitize` those that the machine can run,
// `make emulated` all of x86-64; those for aarch64 in an emulator: `make neon`.
//
// Needs no torch: contracts are pointers, sizes and strides. Each tensor is a heap block of exactly
// its own size, so that one element too far is an error; outputs start as NaN and must end without;
// 2 and 4 threads must give the bits of one, and every target what the first one gives, to rounding.
// Sizes are odd, rows strided, batches empty. With `make emulated`, targets that the machine lacks are
// compiled for the emulator (avx512_emulator.h). It shows AddressSanitizer every tile load; GCC's own are
// assembly, which that does not watch.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#include "kernels/cpu/dispatch/dispatch.h"
#define WGPT_TARGET sanitize
#include "kernels/cpu/simd/elements.h"

namespace wgpt::cpu {
#define WGPT_KERNELS(target)     \
  namespace target {             \
  extern const Kernels kKernels; \
  }
WGPT_KERNELS(generic)
#if defined(__x86_64__)
WGPT_KERNELS(avx2)
WGPT_KERNELS(avx512)
WGPT_KERNELS(avx512_bf16)
WGPT_KERNELS(amx)
#elif defined(__aarch64__)
WGPT_KERNELS(neon)
#endif
}  // namespace wgpt::cpu

namespace {

using namespace wgpt;
using cpu::Kernels;
using cpu::sanitize::BFloat16;
using cpu::sanitize::Float16;
using cpu::sanitize::narrow;

int g_calls = 0;
std::string g_what;      // the case under way
double g_tolerance = 0;  // a few roundings of its type

[[noreturn]] void fail(const char* why) {
  std::fprintf(stderr, "sanitize: %s: %s\n", g_what.c_str(), why);
  std::exit(1);
}

template <int kThreads>
Executor executor() {
  return {[](int64_t n, int64_t, void (*body)(void*, int64_t, int64_t), void* context) {
            std::vector<std::thread> threads;
            for (int64_t i = 0; i < n; ++i) threads.emplace_back(body, context, i, i + 1);
            for (auto& thread : threads) thread.join();
          },
          kThreads};
}

size_t size_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

uint32_t g_random = 1;
double random_number() {  // in [-1, 1)
  g_random = g_random * 1664525u + 1013904223u;
  return static_cast<double>(g_random >> 8) / (1 << 23) - 1.0;
}

// A heap block of n elements: random numbers, or all bits set, which is NaN in every type.
class Block {
 public:
  Block(DType dtype, int64_t n, bool is_output = false) : dtype_(dtype), n_(n) {
    data_ = std::malloc(n_bytes());
    if (is_output) {
      std::memset(data_, 0xff, n_bytes());
      return;
    }
    for (int64_t i = 0; i < n; ++i) {
      cpu::sanitize::with_element(dtype, [&](auto element) {
        using Element = decltype(element);
        using Sum = cpu::sanitize::Arithmetic<Element>;
        static_cast<Element*>(data_)[i] = narrow<Element>(static_cast<Sum>(random_number()));
      });
    }
  }
  Block(const Block&) = delete;
  ~Block() { std::free(data_); }
  void* get() { return data_; }
  size_t n_bytes() const { return static_cast<size_t>(n_) * size_of(dtype_); }

  std::vector<double> numbers() const {
    std::vector<double> x(static_cast<size_t>(n_));
    cpu::sanitize::with_element(dtype_, [&](auto element) {
      for (int64_t i = 0; i < n_; ++i)
        x[static_cast<size_t>(i)] = cpu::sanitize::widen(static_cast<decltype(element)*>(data_)[i]);
    });
    return x;
  }

 private:
  DType dtype_;
  int64_t n_;
  void* data_;
};

// All outputs of the first target in the order of the calls, and where the current target is.
std::vector<std::vector<double>> g_outputs;
size_t g_n_outputs = 0;

void check_numbers(const Block& block) {
  const std::vector<double> numbers = block.numbers();
  for (const double x : numbers) {
    if (x != x) fail("an output was left unwritten, or is NaN");
  }
  if (g_n_outputs++ == g_outputs.size()) return g_outputs.push_back(numbers);
  const std::vector<double>& expected = g_outputs[g_n_outputs - 1];
  double largest = 1, error = 0;  // inputs are of that size; what cancels may be of any
  for (size_t i = 0; i < numbers.size(); ++i) {
    largest = std::max(largest, std::abs(expected[i]));
    error = std::max(error, std::abs(numbers[i] - expected[i]));
  }
  if (!(error <= g_tolerance * largest)) fail("two targets differ by more than roundings");
}

// Runs a kernel on 1, 2 and 4 threads over fresh outputs and compares their bytes.
template <typename Run>
void check(std::initializer_list<std::pair<DType, int64_t>> outputs, size_t workspace_bytes,
           Run&& run) {
  std::vector<std::vector<char>> first;
  for (const Executor& threads : {executor<1>(), executor<2>(), executor<4>()}) {
    std::vector<Block*> blocks;
    for (const auto& [dtype, n] : outputs) blocks.push_back(new Block(dtype, n, true));
    void* workspace = std::aligned_alloc(64, (workspace_bytes + 63) / 64 * 64);
    run(blocks, workspace, threads);
    std::free(workspace);
    for (size_t i = 0; i < blocks.size(); ++i) {
      if (threads.n_threads == 1) check_numbers(*blocks[i]);
      const auto* bytes = static_cast<const char*>(blocks[i]->get());
      if (threads.n_threads == 1) {
        first.emplace_back(bytes, bytes + blocks[i]->n_bytes());
      } else if (!std::equal(first[i].begin(), first[i].end(), bytes)) {
        fail("the bits depend on the number of threads");
      }
      delete blocks[i];
    }
    ++g_calls;
  }
}

void token_concat(const Kernels& kernels, DType dtype, int64_t b, int64_t t, int64_t v, int64_t ct,
                  int64_t cm, bool with_pos) {
  const int64_t c = ct + cm, mel_row = cm + 3, mel_batch = t * mel_row + 5;
  std::vector<int64_t> tokens(static_cast<size_t>(b * t));
  for (auto& token : tokens) token = static_cast<int64_t>((random_number() + 1) / 2 * v);
  Block table(dtype, v * ct), pos(dtype, t * c), d_y(dtype, b * t * c);
  Block mel(dtype, b == 0 || cm == 0 ? 0 : (b - 1) * mel_batch + (t - 1) * mel_row + cm);
  const TokenConcatShape shape{dtype, b, t, v, ct, cm, mel_batch, mel_row};
  check({{dtype, b * t * c}}, 0, [&](auto& out, void*, const Executor& threads) {
    kernels.token_concat_forward({shape, tokens.data(), table.get(), cm > 0 ? mel.get() : nullptr,
                                  with_pos ? pos.get() : nullptr, out[0]->get()},
                                 threads);
  });
  const int64_t pos_rows = with_pos ? t + 2 : 0;
  check({{dtype, v * ct}, {dtype, pos_rows * c}},
        kernels.token_concat_backward_workspace_bytes(shape),
        [&](auto& out, void* workspace, const Executor& threads) {
          kernels.token_concat_backward({shape, tokens.data(), d_y.get(), out[0]->get(),
                                         with_pos ? out[1]->get() : nullptr, pos_rows, workspace},
                                        threads);
        });
}

void mel_embed(const Kernels& kernels, DType dtype, DType frames_dtype, int64_t b, int64_t t,
               int64_t m, int64_t cm, int64_t r, int64_t c, bool with_pos) {
  const DType sum = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  const int64_t k = (c + r) * m, frame = m + 2, sequence = t * r * frame + 7, n = b * t * cm;
  Block frames(frames_dtype, b == 0 ? 0 : (b - 1) * sequence + (t * r - 1) * frame + m);
  Block mean(sum, m), inv_std(sum, m), weight(dtype, cm * k), bias(dtype, cm), pos(dtype, t * cm);
  Block d_y(dtype, n), slope(dtype, n);
  const MelEmbedShape shape{dtype, frames_dtype, b, t, m, cm, r, c, sequence, frame};
  for (const bool save_slope : {false, true}) {
    check({{dtype, n}, {dtype, save_slope ? n : 0}}, 0,
          [&](auto& out, void*, const Executor& threads) {
            kernels.mel_embed_forward({shape, frames.get(), mean.get(), inv_std.get(), weight.get(),
                                       bias.get(), with_pos ? pos.get() : nullptr, out[0]->get(),
                                       save_slope ? out[1]->get() : nullptr},
                                      threads);
          });
  }
  const int64_t pos_rows = with_pos ? t + 2 : 0;
  check({{dtype, cm * k}, {dtype, cm}, {dtype, pos_rows * cm}},
        kernels.mel_embed_backward_workspace_bytes(shape),
        [&](auto& out, void* workspace, const Executor& threads) {
          kernels.mel_embed_backward({shape, frames.get(), mean.get(), inv_std.get(), d_y.get(),
                                      slope.get(), out[0]->get(), out[1]->get(),
                                      with_pos ? out[2]->get() : nullptr, pos_rows, workspace},
                                     threads);
        });
}

void flash_attention(const Kernels& kernels, DType dtype, int64_t b, int64_t tq, int64_t tk,
                     int64_t h, int64_t d, bool causal, int64_t window, int64_t document = 0,
                     int64_t group = 1) {
  const DType sum = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  // Rows as in a fused projection: three times as far apart as they are long.
  const int64_t kv_h = h / group, row = 3 * h * d, n_q = b * tq * h * d, n_k = b * tk * kv_h * d;
  const auto strided = [&](int64_t t, int64_t heads) {
    return b == 0 ? 0 : (b * t - 1) * row + heads * d;
  };
  Block q(dtype, strided(tq, h)), k(dtype, strided(tk, kv_h)), v(dtype, strided(tk, kv_h));
  Block d_out(dtype, n_q), d_lse(sum, b * h * tq);
  const auto wide = [&](Block& x, int64_t t) { return HeadsView{x.get(), t * row, row, d}; };
  const auto dense = [&](Block& x, int64_t t, int64_t heads) {
    return HeadsView{x.get(), t * heads * d, heads * d, d};
  };
  const FlashAttentionShape shape{dtype, b, tq, tk, h, d, 0.2, causal, window, group};
  // Documents of as many steps, which begin elsewhere in every item; on the heap, of exactly its size.
  std::vector<int32_t> first_key;
  for (int64_t i = 0; document > 0 && i < b * tq; ++i) {
    const int64_t position = i % tq + tk - tq, shift = i / tq * 5;
    first_key.push_back(static_cast<int32_t>(
        std::max<int64_t>(0, (position + shift) / document * document - shift)));
  }
  const int32_t* const first = document > 0 ? first_key.data() : nullptr;
  Block out(dtype, n_q), lse(sum, b * h * tq);
  const auto forward = [&](Block& to, Block& to_lse, void* workspace, const Executor& threads) {
    kernels.flash_attention_forward({shape, wide(q, tq), wide(k, tk), wide(v, tk), first,
                                     dense(to, tq, h), to_lse.get(), workspace},
                                    threads);
  };
  const size_t forward_bytes = kernels.flash_attention_forward_workspace_bytes(shape);
  check({{dtype, n_q}, {sum, b * h * tq}}, forward_bytes,
        [&](auto& to, void* workspace, const Executor& threads) {
          forward(*to[0], *to[1], workspace, threads);
        });
  std::vector<char> workspace(forward_bytes + 64);
  const size_t skip = 64 - reinterpret_cast<uintptr_t>(workspace.data()) % 64;
  forward(out, lse, workspace.data() + skip, executor<1>());
  check({{dtype, n_q}, {dtype, n_k}, {dtype, n_k}},
        kernels.flash_attention_backward_workspace_bytes(shape),
        [&](auto& to, void* scratch, const Executor& threads) {
          kernels.flash_attention_backward(
              {shape, wide(q, tq), wide(k, tk), wide(v, tk), dense(out, tq, h), dense(d_out, tq, h),
               first, lse.get(), b % 2 == 0 ? nullptr : d_lse.get(), dense(*to[0], tq, h),
               dense(*to[1], tk, kv_h), dense(*to[2], tk, kv_h), scratch},
              threads);
        });
}

void gemm(const Kernels& kernels, DType dtype, int64_t m, int64_t n, int64_t k) {
  for (const bool a_across : {false, true}) {
    for (const bool b_across : {false, true}) {
      Block a(dtype, m * k), b(dtype, k * n);
      const auto call_of = [&](void* c, Packing b_packing, void* workspace) {
        return Gemm{dtype,
                    m,
                    n,
                    k,
                    a.get(),
                    b.get(),
                    a_across ? 1 : k,
                    a_across ? m : 1,
                    b_across ? 1 : n,
                    b_across ? k : 1,
                    c,
                    n,
                    false,
                    b_packing,
                    workspace};
      };
      for (const Packing first : {Packing::kPackPerCall, Packing::kPackAndKeep}) {
        check({{dtype, m * n}}, kernels.gemm_workspace_bytes(call_of(nullptr, first, nullptr)),
              [&](auto& out, void* workspace, const Executor& threads) {
                bool is_finite = true;
                Packing packing = first;
                if (first == Packing::kPackAndKeep) {
                  std::vector<float> other(static_cast<size_t>(m * n));  // enough for any type
                  is_finite = kernels.gemm(call_of(other.data(), first, workspace), threads);
                  packing = Packing::kPackedBefore;
                }
                const Gemm call = call_of(out[0]->get(), packing, workspace);
                is_finite = kernels.gemm(call, threads) && is_finite;
                if (!is_finite) fail("a result is not finite");
              });
      }
    }
  }
}

void packed_addmm(const Kernels& kernels, PanelType type, int64_t m, int64_t n, int64_t k) {
  const int64_t n_weights = (n + kPanelColumns - 1) / kPanelColumns * kPanelColumns * k;
  const int64_t x_row = k + 3;
  const bool is_int8 = type == PanelType::kInt8;
  Block x(DType::kFloat32, (m - 1) * x_row + k),
      panels(type == PanelType::kBFloat16 ? DType::kBFloat16 : DType::kFloat32,
             is_int8 ? 1 : n_weights),
      scale(DType::kFloat32, n), addend(DType::kFloat32, m * n);
  std::vector<int8_t> bytes;
  for (int64_t i = 0; is_int8 && i < n_weights; ++i)
    bytes.push_back(static_cast<int8_t>(i * 37 % 255 - 127));
  bytes.shrink_to_fit();  // a read past it is seen
  for (const int64_t addend_row : {int64_t{-1}, int64_t{0}, n}) {
    check({{DType::kFloat32, m * n}}, 0, [&](auto& out, void*, const Executor& threads) {
      const Gemm call{DType::kFloat32,
                      m,
                      n,
                      k,
                      x.get(),
                      is_int8 ? bytes.data() : panels.get(),
                      x_row,
                      1,
                      0,
                      0,
                      out[0]->get(),
                      n,
                      false,
                      Packing::kPrepacked,
                      nullptr,
                      addend_row < 0 ? nullptr : addend.get(),
                      addend_row,
                      type,
                      is_int8 ? static_cast<const float*>(scale.get()) : nullptr};
      kernels.gemm(call, threads);
    });
  }
}

double tolerance_of(DType dtype) {
  return dtype == DType::kFloat64    ? 1e-13
         : dtype == DType::kFloat32  ? 1e-5
         : dtype == DType::kBFloat16 ? 3e-2
                                     : 2e-3;
}

// GEMMs of the types that a target prefers its own for; generic runs all, to be compared with.
void gemms(const Kernels& kernels) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    g_tolerance = tolerance_of(dtype);
    g_what = std::string("gemm, ") + kernels.target + ", type " +
             std::to_string(static_cast<int>(dtype));
    g_random = 1;
    Gemm large{dtype};
    large.m = large.n = large.k = 4096;
    if (!kernels.prefers_own_gemm(large) && &kernels != &cpu::generic::kKernels) {
      constexpr size_t kOutputs = 6 * 4 * 2;  // sizes, layouts, packings
      g_n_outputs += kOutputs;
      continue;
    }
    gemm(kernels, dtype, 1, 1, 1);
    gemm(kernels, dtype, 32, 64, 32);
    gemm(kernels, dtype, 33, 65, 31);
    gemm(kernels, dtype, 300, 47, 257);
    gemm(kernels, dtype, 70, 550, 300);
    gemm(kernels, dtype, 36, 130, 514);  // whole panels and units: rows are read in place
  }
}

void run_all(const Kernels& kernels, DType dtype) {
  g_tolerance = tolerance_of(dtype);
  const std::string where =
      std::string(kernels.target) + ", type " + std::to_string(static_cast<int>(dtype));
  for (const bool with_pos : {false, true}) {
    g_what = "token_concat, " + where;
    token_concat(kernels, dtype, 0, 3, 5, 4, 3, with_pos);
    token_concat(kernels, dtype, 1, 1, 1, 1, 0, with_pos);
    token_concat(kernels, dtype, 2, 7, 13, 5, 3, with_pos);
    token_concat(kernels, dtype, 3, 65, 17, 33, 47, with_pos);
    g_what = "mel_embed, " + where;
    mel_embed(kernels, dtype, dtype, 0, 3, 5, 4, 1, 0, with_pos);
    mel_embed(kernels, dtype, dtype, 1, 1, 1, 1, 1, 0, with_pos);
    mel_embed(kernels, dtype, DType::kFloat16, 2, 7, 13, 5, 1, 2, with_pos);
    mel_embed(kernels, dtype, dtype, 3, 97, 64, 65, 1, 1, with_pos);
    mel_embed(kernels, dtype, dtype, 2, 193, 32, 70, 3, 2, with_pos);
    mel_embed(kernels, dtype, dtype, 1, 97, 64, 17, 1, 3, with_pos);
    mel_embed(kernels, dtype, DType::kFloat16, 2, 65, 96, 41, 2, 2, with_pos);
  }
  g_what = "flash_attention, " + where;
  for (const int64_t d : kCpuHeadDims) {
    flash_attention(kernels, dtype, 0, 3, 3, 2, d, true, 0);
    flash_attention(kernels, dtype, 1, 1, 1, 1, d, true, 0);
    flash_attention(kernels, dtype, 2, 7, 7, 3, d, true, 3);
    flash_attention(kernels, dtype, 1, 75, 75, 1, d, false, 0);
    flash_attention(kernels, dtype, 1, 193, 193, 2, d, true, 0);
    flash_attention(kernels, dtype, 1, 101, 801, 1, d, true, 0);  // parts of the keys
    flash_attention(kernels, dtype, 2, 3, 600, 1, d, true, 0);    // decoding
    flash_attention(kernels, dtype, 1, 5, 205, 3, d, true, 100);
    flash_attention(kernels, dtype, 1, 51, 60, 1, d, false, 17);
    flash_attention(kernels, dtype, 2, 200, 200, 1, d, true, 0, 67);
    flash_attention(kernels, dtype, 1, 450, 700, 1, d, true, 0, 430);  // few long documents
    flash_attention(kernels, dtype, 3, 70, 90, 1, d, true, 9, 1);
    flash_attention(kernels, dtype, 2, 3, 600, 1, d, true, 0, 598);  // decoding
    flash_attention(kernels, dtype, 1, 3, 600, 4, d, true, 0, 0, 2);
    flash_attention(kernels, dtype, 1, 451, 451, 3, d, true, 0, 0, 3);  // parts of the keys
    flash_attention(kernels, dtype, 2, 200, 200, 4, d, true, 0, 67, 2);
  }
}

}  // namespace

int main() {
  std::vector<const Kernels*> targets;  // generic first
  for (auto kernels = cpu::available(); *kernels != nullptr; ++kernels)
    targets.insert(targets.begin(), *kernels);
#if defined(WGPT_EMULATED)
  targets = {&cpu::generic::kKernels, &cpu::avx2::kKernels, &cpu::avx512::kKernels,
             &cpu::avx512_bf16::kKernels, &cpu::amx::kKernels};
#endif
  for (const Kernels* kernels : targets) {
    g_random = 1;
    g_n_outputs = 0;
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kFloat64})
      run_all(*kernels, dtype);
    gemms(*kernels);
    g_random = 1;
    g_tolerance = tolerance_of(DType::kFloat32);
    g_what = std::string("packed_addmm, ") + kernels->target;
    for (const PanelType type : {PanelType::kFloat32, PanelType::kBFloat16, PanelType::kInt8}) {
      for (const int64_t m : {1, 2, 3, 4, 5, 6, 53})
        packed_addmm(*kernels, type, m, 64 + m * 7, 300 + m);
      packed_addmm(*kernels, type, 7, 200, 700);
    }
    std::printf("sanitize: %s done\n", kernels->target);
    std::fflush(stdout);
  }
  std::printf("sanitize: %d kernel calls, no fault\n", g_calls);
}

// Records what a GPU answers to the probes of gpu_golden.cuh, one JSON line per probe and round; the emulator must give
// the same (tests/simt/test_simt_wrappers.py). From the repository's root, on a machine with a GPU:
//
//   nvcc -std=c++17 -O2 -arch=native -Icsrc -Ibenchmarks benchmarks/gpu_golden.cu -o build/gpu_golden
//   build/gpu_golden > tests/simt/golden.jsonl
#include <cmath>
#include <cstdio>
#include <vector>

#include "gpu_golden.cuh"

using namespace wgpt::cuda::golden;

namespace {

uint64_t state = 1;
uint32_t random_word() {
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  return static_cast<uint32_t>(state >> 32);
}

// Numbers that neither overflow a half nor vanish in it: sign, exponent -7..8, random mantissa.
uint32_t random_float() {
  const uint32_t bits = random_word();
  return (bits & 0x807fffffu) | (120 + (bits >> 24) % 16) << 23;
}
uint32_t random_bf16() { return random_float() >> 16; }
uint32_t random_half() {
  const uint32_t bits = random_word();
  return (bits & 0x83ffu) | (8 + (bits >> 16) % 12) << 10;
}

uint32_t input_word(int id, int word) {
  switch (id) {
    case kMmaBf16:
      return word < 6 ? random_bf16() | random_bf16() << 16 : random_float();
    case kMmaHalf:
      return word < 6 ? random_half() | random_half() << 16 : random_float();
    case kFromHalf:
      return random_word() & 0xffff;
    case kMmaTf32:
    case kPackBf16:
    case kPackHalf:
    case kExp2:
      return random_float();
    case kCopyAsync:
      return word == 4 ? random_word() & 1 : random_word();
    default:
      return random_word();
  }
}

void print(const char* key, const std::vector<uint32_t>& words) {
  std::printf("\"%s\": [", key);
  for (size_t i = 0; i < words.size(); ++i) std::printf("%s%u", i == 0 ? "" : ", ", words[i]);
  std::printf("]");
}

}  // namespace

int main() {
  uint32_t *in_device, *out_device;
  if (cudaMalloc(&in_device, 4096) != cudaSuccess || cudaMalloc(&out_device, 4096) != cudaSuccess) {
    std::fprintf(stderr, "gpu_golden: no usable GPU: %s\n", cudaGetErrorString(cudaGetLastError()));
    return 1;
  }
  cudaDeviceProp device;
  cudaGetDeviceProperties(&device, 0);
  for (int id = 0; id < kProbes; ++id) {
    for (int round = 0; round < 2; ++round) {
      std::vector<uint32_t> in(32 * kProbe[id].in_words), out(32 * kProbe[id].out_words);
      for (size_t i = 0; i < in.size(); ++i)
        in[i] = input_word(id, static_cast<int>(i) % kProbe[id].in_words);
      cudaMemcpy(in_device, in.data(), in.size() * 4, cudaMemcpyHostToDevice);
      const char* error = run_probe(id, in_device, out_device, nullptr);
      if (error == nullptr && cudaMemcpy(out.data(), out_device, out.size() * 4,
                                         cudaMemcpyDeviceToHost) != cudaSuccess) {
        error = cudaGetErrorString(cudaGetLastError());
      }
      if (error != nullptr) {
        std::fprintf(stderr, "gpu_golden: %s: %s\n", kProbe[id].name, error);
        return 1;
      }
      std::printf("{\"device\": \"%s\", \"probe\": \"%s\", ", device.name, kProbe[id].name);
      print("in", in);
      std::printf(", ");
      print("out", out);
      std::printf("}\n");
    }
  }
  return 0;
}

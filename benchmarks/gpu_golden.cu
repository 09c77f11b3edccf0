// Records what a GPU answers to the probes of gpu_golden.cuh on the inputs of gpu_golden_inputs.h,
// one JSON line per probe and round; the emulator must give the same
// (tests/simt/test_simt_wrappers.py). From the repository's root, on a machine with a GPU:
//
//   nvcc -std=c++17 -O2 -arch=native -Icsrc -Ibenchmarks benchmarks/gpu_golden.cu -o build/gpu_golden
//   build/gpu_golden > tests/simt/golden.jsonl
#include <cstdio>
#include <vector>

#include "gpu_golden_inputs.h"

using namespace wgpt::cuda::golden;

namespace {

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
    for (int round = 0; round < rounds_of(id); ++round) {
      std::vector<uint32_t> in(32 * kProbe[id].in_words), out(32 * kProbe[id].out_words);
      write_input(id, round, in.data());
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
      std::printf("{\"device\": \"%s\", \"arch\": %d, \"probe\": \"%s\", \"round\": %d, ",
                  device.name, 10 * device.major + device.minor, kProbe[id].name, round);
      print("in", in);
      std::printf(", ");
      print("out", out);
      std::printf("}\n");
    }
  }
  return 0;
}

// Tensors for gpu_driver: float64 values on the host beside their rounded copy in device memory, which is guarded at
// both ends. Under nvcc a GPU's memory; under another compiler the SIMT emulator's arena (tests/simt/machine_api.h).
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "kernels/common.h"
#include "simt/numbers.h"
#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
extern "C" {
void* simt_allocate(size_t bytes);
void simt_free_all();
}
#endif

namespace wgpt::driver {

[[noreturn]] inline void stop(const char* what) {
  std::fprintf(stderr, "gpu_driver: %s\n", what);
  std::exit(2);
}

#ifdef __CUDACC__
inline void check(cudaError_t error) {
  if (error != cudaSuccess) stop(cudaGetErrorString(error));
}
inline std::vector<void*>& allocations() {
  static std::vector<void*> all;
  return all;
}
inline void* device_allocate(size_t bytes) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, bytes));
  allocations().push_back(memory);
  return memory;
}
inline void free_all() {
  for (void* memory : allocations()) check(cudaFree(memory));
  allocations().clear();
}
inline void to_device(void* to, const void* from, size_t bytes) {
  check(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice));
}
inline void to_host(void* to, const void* from, size_t bytes) {
  check(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost));  // waits for the kernels before
}
inline void wait() { check(cudaDeviceSynchronize()); }
#else
inline void* device_allocate(size_t bytes) {
  void* memory = simt_allocate(bytes);
  if (memory == nullptr) stop("no room in the emulator's arena");
  return memory;
}
inline void free_all() { simt_free_all(); }
inline void to_device(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }
inline void to_host(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }
inline void wait() {}
#endif

inline size_t bytes_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

inline void encode(DType dtype, uint8_t* to, double value) {
  const float x = static_cast<float>(value);
  const uint16_t half = dtype == DType::kBFloat16 ? simt::float_to_bf16(x) : simt::float_to_half(x);
  if (dtype == DType::kFloat32) {
    std::memcpy(to, &x, 4);
  } else {
    std::memcpy(to, &half, 2);
  }
}

inline double decode(DType dtype, const uint8_t* from) {
  float x;
  uint16_t half;
  if (dtype == DType::kFloat32) {
    std::memcpy(&x, from, 4);
    return x;
  }
  std::memcpy(&half, from, 2);
  return dtype == DType::kBFloat16 ? simt::bf16_to_float(half) : simt::half_to_float(half);
}

// A variate of mean 0 and variance 1, the sum of four uniform ones; the same on every machine.
inline double variate() {
  static uint64_t state = 1;
  uint64_t word = state = state * 6364136223846793005ull + 1442695040888963407ull;
  word ^= word >> 29;
  int64_t sum = 2;
  for (int i = 0; i < 4; ++i) sum += word >> 16 * i & 0xffff;
  return (sum / 65536.0 - 2) * 1.7320508075688772;
}

constexpr size_t kGuardBytes = 256;
constexpr uint8_t kGuard = 0xa5;

// n elements. offset: elements in front of the first, so that an odd one takes the alignment away.
struct Tensor {
  DType dtype;
  int64_t n = 0;
  std::vector<double> values;  // of inputs: what the device holds, rounded
  uint8_t* memory = nullptr;
  int64_t offset = 0;

  void* data() const { return memory + kGuardBytes + offset * bytes_of(dtype); }
  size_t n_bytes() const { return (offset + n) * bytes_of(dtype); }
};

inline Tensor allocated(DType dtype, int64_t n, int64_t offset, std::vector<uint8_t>& image) {
  Tensor tensor{dtype, n, {}, nullptr, offset};
  image.assign(tensor.n_bytes() + 2 * kGuardBytes, kGuard);
  tensor.memory = static_cast<uint8_t*>(device_allocate(image.size()));
  return tensor;
}

inline Tensor input(DType dtype, int64_t n, int64_t offset = 0, double gain = 1, double mean = 0) {
  std::vector<uint8_t> image;
  Tensor tensor = allocated(dtype, n, offset, image);
  tensor.values.resize(n);
  uint8_t* at = image.data() + kGuardBytes + offset * bytes_of(dtype);
  for (int64_t i = 0; i < n; ++i, at += bytes_of(dtype)) {
    encode(dtype, at, mean + gain * variate());
    tensor.values[i] = decode(dtype, at);
  }
  to_device(tensor.memory, image.data(), image.size());
  return tensor;
}

// Filled with NaN: an element that no kernel writes is seen.
inline Tensor output(DType dtype, int64_t n, int64_t offset = 0) {
  std::vector<uint8_t> image;
  Tensor tensor = allocated(dtype, n, offset, image);
  std::memset(image.data() + kGuardBytes, 0xff, tensor.n_bytes());
  to_device(tensor.memory, image.data(), image.size());
  return tensor;
}

inline void* workspace(size_t bytes) { return bytes == 0 ? nullptr : device_allocate(bytes); }

template <typename Integer>
Integer* integers(const std::vector<Integer>& values) {
  void* memory = device_allocate((values.size() + 1) * sizeof(Integer));
  to_device(memory, values.data(), values.size() * sizeof(Integer));
  return static_cast<Integer*>(memory);
}

// What the device holds; `touched` where a kernel wrote outside.
inline std::vector<double> fetch(const Tensor& tensor, bool& touched) {
  std::vector<uint8_t> image(tensor.n_bytes() + 2 * kGuardBytes);
  to_host(image.data(), tensor.memory, image.size());
  for (size_t i = 0; i < kGuardBytes; ++i)
    touched |= image[i] != kGuard || image[image.size() - 1 - i] != kGuard;
  std::vector<double> values(tensor.n);
  const uint8_t* at = image.data() + kGuardBytes + tensor.offset * bytes_of(tensor.dtype);
  for (double& value : values) {
    value = decode(tensor.dtype, at);
    at += bytes_of(tensor.dtype);
  }
  return values;
}

}  // namespace wgpt::driver

// Small kernels, right and wrong, that show what the emulator does and what it says; and the probes of the device
// wrappers. One library for test_simt_machine.py and test_simt_wrappers.py.
#include "../../benchmarks/gpu_golden_inputs.h"
#include "machine_api.h"
#include "simt/cuda_names.h"

namespace {

__global__ void block_sum(const float* x, float* sums, int n) {  // the usual two-level sum; right
  SIMT_SHARED(float, of_warp, 32);
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  float sum = i < n ? x[i] : 0.f;
  for (int d = 16; d > 0; d /= 2) sum += __shfl_down_sync(0xffffffffu, sum, d);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0.f;
    for (unsigned w = 0; w < blockDim.x / 32; ++w) total += of_warp[w];
    sums[blockIdx.x] = total;
  }
}

__global__ void lane_operations(int* out) {
  const int lane = threadIdx.x, at = lane * 8;
  out[at] = __shfl_sync(0xffffffffu, lane * 10, 5);
  out[at + 1] = __shfl_sync(0xffffffffu, lane * 10, 1, 8);
  out[at + 2] = __shfl_xor_sync(0xffffffffu, lane, 3);
  out[at + 3] = __shfl_up_sync(0xffffffffu, lane, 2, 16);
  out[at + 4] = __shfl_down_sync(0xffffffffu, lane, 4, 16);
  out[at + 5] = static_cast<int>(__ballot_sync(0xffffffffu, lane % 3 == 0));
  out[at + 6] = static_cast<int>(__match_any_sync(0xffffffffu, lane % 4));
  out[at + 7] = __any_sync(0xffffffffu, lane == 31) + 2 * __all_sync(0xffffffffu, lane < 31);
}

__global__ void count_hits(int* hits) { atomicAdd(hits, 1); }

// One mistake each; test_simt_machine.py says what must be reported.
__global__ void mistake(int which, float* data, int n) {
  SIMT_SHARED(float, shared, 64);
  const int i = threadIdx.x;
  switch (which) {
    case 0:  // half of the warp waits elsewhere
      if (i < 16) {
        __syncthreads();
      } else {
        __syncwarp();
      }
      break;
    case 1:  // two collectives at once
      if (i % 2 == 0) {
        data[i] = __shfl_sync(0xffffffffu, 1.f, 0);
      } else {
        data[i] = static_cast<float>(__ballot_sync(0xffffffffu, 1));
      }
      break;
    case 2:
      __syncwarp(1u);
      break;  // a mask without the caller
    case 3:
      shared[i + 40] = 1.f;
      break;  // past a shared array of 64
    case 4:
      data[i + n - 8] = 1.f;
      break;  // past a tensor
    case 5:
      data[i] = shared[i];
      break;  // never written: poison
    case 6: {
      float x[4];
      simt::load_bytes<16>(x, data + i + 1);  // misaligned for most lanes
      break;
    }
    case 7:
      simt::copy_async(shared, data, 16, 16);
      break;  // nobody waits
    case 8:
      data[0] = static_cast<float>(blockIdx.x);
      break;  // every block writes it
    case 9:   // a neighbour's value without a barrier
      shared[i] = static_cast<float>(i);
      data[i] = shared[(i + 1) % 32];
      break;
    case 10:  // ... and with one: right
      shared[i] = static_cast<float>(i);
      __syncwarp();
      data[i] = shared[(i + 1) % 32];
      break;
    case 11:  // a lane that has left
      if (i == 7) return;
      data[i] = __shfl_xor_sync(0xffffffffu, data[i], 1);
      break;
    case 12:  // threads that have left do not hold up a block barrier: right
      if (i < 8) return;
      __syncthreads();
      break;
    case 13:
      data[i] = __shfl_sync(0x0000ffffu << (i / 16 * 16), 1.f, i % 16 + 16);
      break;  // a lane outside the mask
  }
}

}  // namespace

extern "C" {
const char* machine_block_sum(const float* x, float* sums, int n, int blocks, int threads) {
  return simt::launch(blocks, threads, 0, block_sum, x, sums, n);
}
const char* machine_lane_operations(int* out) {
  return simt::launch(1, 32, 0, lane_operations, out);
}
const char* machine_count_hits(int* hits, int blocks, int threads) {
  return simt::launch(blocks, threads, 0, count_hits, hits);
}
const char* machine_mistake(int which, float* data, int n, int blocks) {
  return simt::launch(blocks, 32, 0, mistake, which, data, n);
}
const char* machine_launch(unsigned grid, unsigned threads, size_t shared_bytes, int* hits) {
  return simt::launch(grid, threads, shared_bytes, count_hits, hits);
}
int probe_count() { return wgpt::cuda::golden::kProbes; }
const char* probe_name(int id) { return wgpt::cuda::golden::kProbe[id].name; }
int probe_in_words(int id) { return wgpt::cuda::golden::kProbe[id].in_words; }
int probe_out_words(int id) { return wgpt::cuda::golden::kProbe[id].out_words; }
int probe_rounds(int id) { return wgpt::cuda::golden::rounds_of(id); }
void probe_input(int id, int round, uint32_t* in) {
  wgpt::cuda::golden::write_input(id, round, in);
}
const char* probe_run(int id, const uint32_t* in, uint32_t* out) {
  return wgpt::cuda::golden::run_probe(id, in, out, nullptr);
}
}

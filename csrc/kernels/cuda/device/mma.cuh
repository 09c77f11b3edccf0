// Tensor cores and their feeding, one wrapper per instruction: PTX under nvcc, the emulator's functions elsewhere.
// Fragment layouts are those of the PTX ISA (9.7.15); csrc/simt/warp_ops.cpp draws them. sm_80 and up.
#pragma once

#include "kernels/cuda/device/types.cuh"

namespace wgpt::cuda {

// 2^x, flushing denormals: about 2 ulp; 2^-inf = 0.
WGPT_DEVICE float exp2_approx(float x) {
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

// Four 8 x 8 matrices of 16-bit elements; lane 8i + r brings the (16-byte aligned) address of row r of matrix i. Lane l
// receives of matrix i the elements (l / 4, 2 (l % 4) + {0, 1}).
WGPT_DEVICE void ldmatrix_x4(uint32_t (&out)[4], const void* row) {
#ifdef __CUDACC__
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
#else
  simt::ldmatrix(out, row, 4, false);
#endif
}

// The same, each matrix transposed: lane l receives the elements (2 (l % 4) + {0, 1}, l / 4).
WGPT_DEVICE void ldmatrix_x4_trans(uint32_t (&out)[4], const void* row) {
#ifdef __CUDACC__
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
#else
  simt::ldmatrix(out, row, 4, true);
#endif
}

// d += a b for a 16 x 16 A, 16 x 8 B of 16-bit elements, float32 sums.
template <typename T>
WGPT_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
WGPT_DEVICE void mma_m16n8k16<Bf16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef __CUDACC__
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  simt::mma_m16n8k16(d, a, b, d, simt::MmaType::kBf16);
#endif
}
template <>
WGPT_DEVICE void mma_m16n8k16<Half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef __CUDACC__
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, "
      "%9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  simt::mma_m16n8k16(d, a, b, d, simt::MmaType::kHalf);
#endif
}

// d += a b for a 16 x 8 A, 8 x 8 B of tf32 values (float32 bits of which the unit reads the upper 19).
WGPT_DEVICE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef __CUDACC__
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, "
      "%9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  simt::mma_m16n8k8_tf32(d, a, b, d);
#endif
}

// x rounded to tf32 (nearest, ties away from zero), as float32 bits.
WGPT_DEVICE uint32_t round_to_tf32(float x) {
#ifdef __CUDACC__
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
#else
  return __float_as_uint(simt::float_to_tf32(x));
#endif
}

// 16 bytes, tensor to shared memory, in the background, past the L1 cache; with `valid` false, zeros, and `from` is not
// read (but must be an address that could be).
WGPT_DEVICE void copy_async16(void* shared, const void* from, bool valid) {
#ifdef __CUDACC__
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes)
               : "memory");
#else
  simt::copy_async(shared, from, 16, valid ? 16 : 0);
#endif
}

// Closes the group of copies that this thread has issued since the last commit.
WGPT_DEVICE void copy_async_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  simt::copy_async_commit();
#endif
}

// Waits until at most kGroups of this thread's newest groups are in flight. Others see the data after a barrier.
template <int kGroups>
WGPT_DEVICE void copy_async_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
#else
  simt::copy_async_wait(kGroups);
#endif
}

}  // namespace wgpt::cuda

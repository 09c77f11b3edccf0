// The nvcc unit of rotary_qkv; the emulator's tests include the same .cuh.
#include "kernels/cuda/rotary_qkv.cuh"

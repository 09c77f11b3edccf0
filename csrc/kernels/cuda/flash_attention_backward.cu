// The nvcc unit of flash_attention's backward; the emulator's tests include the same .cuh.
#include "kernels/cuda/flash_attention_backward.cuh"

// The nvcc unit of flash_attention's forward; the emulator's tests include the same .cuh.
#include "kernels/cuda/flash_attention.cuh"

// The nvcc unit of token_concat; the emulator's tests include the same .cuh.
#include "kernels/cuda/token_concat.cuh"

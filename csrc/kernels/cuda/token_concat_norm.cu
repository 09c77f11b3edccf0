// The nvcc unit of token_concat_norm; the emulator's tests include the same .cuh.
#include "kernels/cuda/token_concat_norm.cuh"

// The nvcc unit of add_rms_norm; the emulator's tests include the same .cuh.
#include "kernels/cuda/add_rms_norm.cuh"

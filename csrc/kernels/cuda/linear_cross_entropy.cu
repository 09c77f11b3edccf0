// The nvcc unit of linear_cross_entropy; the emulator's tests include the same .cuh.
#include "kernels/cuda/linear_cross_entropy.cuh"

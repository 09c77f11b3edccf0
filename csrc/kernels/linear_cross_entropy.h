// linear_cross_entropy's own arithmetic: rows of logits become their loss and their gradient.
//
//   loss[n] = log sum_v exp(logits[n,v]) - logits[n, target[n]]
//   logits[n,v] <- softmax(logits[n])[v] - (v == target[n])         in place
//   correct[n] = whether target[n] is the first of the largest logits
//
// logits (N, V), rows row_stride apart; targets (N,) int64, each in [0, V) or equal to ignore_index, whose rows
// have loss 0 and gradient 0. loss in float32 (float64 for float64). Without gradients the logits
// stay as they are. Three passes over a row that stays in the first cache; two with no gradient.
#pragma once

#include "kernels/common.h"

namespace wgpt {

struct CrossEntropyRows {
  DType dtype;
  int64_t rows, vocab, row_stride, ignore_index;
  bool gradients;
  void* logits;
  const int64_t* targets;
  void* loss;
  uint8_t* correct;
};

// total () and n_correct (): the sums of loss, float32, and of correct, both (rows,). For CUDA alone: on the CPU
// they are a loop.
struct CrossEntropySums {
  const float* loss;
  const uint8_t* correct;
  int64_t rows;
  float* total;
  int64_t* n_correct;
};

}  // namespace wgpt

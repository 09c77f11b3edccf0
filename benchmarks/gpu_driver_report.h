// What gpu_driver says of each result, and by which limit.
#pragma once

#include <string>

#include "gpu_driver_memory.h"
#include "gpu_driver_reference.h"

namespace wgpt::driver {

inline int n_results = 0, n_wrong = 0;

inline const char* name_of(DType dtype) {
  return dtype == DType::kFloat32 ? "float32" : dtype == DType::kBFloat16 ? "bfloat16" : "float16";
}

inline void report(const std::string& what, double error, double limit) {
  const bool ok = error <= limit;  // false for NaN
  ++n_results;
  n_wrong += !ok;
  std::printf("%-5s %s: %.2g (limit %.2g)\n", ok ? "ok" : "WRONG", what.c_str(), error, limit);
  std::fflush(stdout);
}

// The worst row of `got` against `want`, rows of `length` values.
inline double worst_row(const double* got, const Values& want, int64_t length) {
  const double mean_square = dot(want.data(), want.data(), want.size()) / want.size();
  double worst = 0;
  for (size_t row = 0; row < want.size(); row += length) {
    double error = 0, square = mean_square * length;
    for (int64_t i = 0; i < length; ++i) error += std::pow(got[row + i] - want[row + i], 2);
    square = std::max({square, dot(&want[row], &want[row], length), 1e-300});
    const double relative = std::sqrt(error / square);
    if (!(relative <= worst)) worst = relative;  // also NaN, which then stays
    if (std::isnan(worst)) break;
  }
  return worst;
}

inline void check_launch(const std::string& what, const char* failure) {
  if (failure != nullptr) {
    std::printf("WRONG %s: %s\n", what.c_str(), failure);
    std::fflush(stdout);
    ++n_results;
    ++n_wrong;
  }
}

struct Limits {
  double float32, bfloat16, float16;
  double of(DType dtype) const {
    return dtype == DType::kFloat32 ? float32 : dtype == DType::kBFloat16 ? bfloat16 : float16;
  }
};

}  // namespace wgpt::driver

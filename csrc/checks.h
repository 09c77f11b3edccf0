// Argument checks that say who, which argument, the rule, what was expected and what came.
//
//   flash_attention: k must have shape (B, Tk, H, D) = (2, *, 4, 64), got (2, 7, 3, 64)
//
// Checked once, here at the boundary; kernels trust their contracts. Everything throws
// std::invalid_argument, which Python sees as ValueError.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

#include "kernels/common.h"

namespace wgpt {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline constexpr int64_t kAny = -1;  // a size that check_shape leaves free

template <typename... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream message;
  message << op << ": ";
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

// "(2, *, 64)": kAny prints as a star.
template <typename Sizes>
std::string shape_text(const Sizes& sizes) {
  std::ostringstream text;
  text << '(';
  const char* separator = "";
  for (int64_t size : sizes) {
    text << separator;
    if (size == kAny) {
      text << '*';
    } else {
      text << size;
    }
    separator = ", ";
  }
  text << (sizes.size() == 1 ? ",)" : ")");
  return text.str();
}

// torch's own spelling: "float32", not "Float".
inline std::string dtype_text(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Bool:
      return "bool";
    default:
      return torch::headeronly::toString(dtype);
  }
}

inline std::string device_text(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  return (tensor.is_cuda() ? "cuda:" : "device:") + std::to_string(tensor.get_device_index());
}

// axes names the dimensions, "(B, T, C)"; expected gives their sizes or kAny.
inline void check_shape(const char* op, const char* name, const Tensor& tensor, const char* axes,
                        std::initializer_list<int64_t> expected) {
  const auto sizes = tensor.sizes();
  bool ok = sizes.size() == expected.size();
  size_t i = 0;
  for (int64_t size : expected) {
    if (!ok) break;
    ok = size == kAny || sizes[i] == size;
    ++i;
  }
  if (!ok) {
    fail(op, name, " must have shape ", axes, " = ", shape_text(expected), ", got ",
         shape_text(sizes));
  }
}

inline void check_dtype(const char* op, const char* name, const Tensor& tensor, ScalarType expected,
                        const char* why = "") {
  if (tensor.scalar_type() != expected) {
    fail(op, name, " must be ", dtype_text(expected), why, ", got ",
         dtype_text(tensor.scalar_type()));
  }
}

inline void check_same_device(const char* op, const char* name, const Tensor& tensor,
                              const char* other_name, const Tensor& other) {
  if (tensor.device() != other.device()) {
    fail(op, name, " must be on ", device_text(other), " like ", other_name, ", got ",
         device_text(tensor));
  }
}

inline void check_at_least(const char* op, const char* name, int64_t value, int64_t low) {
  if (value < low) fail(op, name, " must be at least ", low, ", got ", value);
}

inline void check_at_most(const char* op, const char* name, int64_t value, int64_t high) {
  if (value > high) fail(op, name, " must be at most ", high, ", got ", value);
}

// More entries than any memory holds: a workspace that grows with V keeps a size that is a number.
inline void check_vocab(const char* op, int64_t vocab) {
  check_at_least(op, "vocab", vocab, 0);
  check_at_most(op, "vocab", vocab, int64_t{1} << 48);
}

// The kernels' name for the element type of a floating-point argument.
inline DType floating_type(const char* op, const char* name, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::Double:
      return DType::kFloat64;
    default:
      fail(op, name, " must be float32, bfloat16, float16 or float64, got ", dtype_text(dtype));
  }
}

inline DType floating_type(const char* op, const char* name, const Tensor& tensor) {
  return floating_type(op, name, tensor.scalar_type());
}

// The same for an op with CUDA kernels, none of which knows float64.
inline DType element_type(const char* op, const char* name, const Tensor& tensor) {
  const DType dtype = floating_type(op, name, tensor);
  if (dtype == DType::kFloat64 && !tensor.is_cpu())
    fail(op, name, " may be float64 on the CPU only, got float64 on ", device_text(tensor));
  return dtype;
}

// Sums and statistics of float64 stay float64; everything else accumulates in float32.
inline ScalarType accumulation_type(DType dtype) {
  return dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

}  // namespace wgpt

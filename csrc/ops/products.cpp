#include "ops/products.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>

namespace wgpt {
namespace {

constexpr int64_t kStripRows = 64;

// A tensor without history: on a pool thread autograd's state is not the caller's.
Tensor as_tensor(const Matrix& m) {
  return torch::stable::from_blob(m.data, {m.rows, m.columns}, {m.row_stride, m.column_stride},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                  m.dtype);
}

}  // namespace

Matrix::Matrix(const Tensor& tensor)
    : data(static_cast<char*>(const_cast<void*>(tensor.const_data_ptr()))),
      rows(tensor.size(0)),
      columns(tensor.size(1)),
      row_stride(tensor.stride(0)),
      column_stride(tensor.stride(1)),
      dtype(tensor.scalar_type()),
      element_size(tensor.element_size()) {}

Matrix Matrix::transposed() const {
  Matrix m = *this;
  std::swap(m.rows, m.columns);
  std::swap(m.row_stride, m.column_stride);
  return m;
}

Matrix Matrix::slice_rows(int64_t begin, int64_t end) const {
  Matrix m = *this;
  m.data += begin * row_stride * element_size;
  m.rows = end - begin;
  return m;
}

Matrix Matrix::slice_columns(int64_t begin, int64_t end) const {
  return transposed().slice_rows(begin, end).transposed();
}

void multiply(const Matrix& out, const Matrix& a, const Matrix& b) {
  const Tensor out_tensor = as_tensor(out), a_tensor = as_tensor(a), b_tensor = as_tensor(b);
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_mm_out(out_tensor.get(), a_tensor.get(), b_tensor.get()));
}

void multiply_transposed(const Matrix& out, const Matrix& a, const Matrix& b) {
  for_each_block(out.rows, kStripRows, [&](int64_t begin, int64_t end) {
    multiply(out.slice_rows(begin, end), a.slice_columns(begin, end).transposed(), b);
  });
}

Executor this_thread() {
  const auto run = [](int64_t n, int64_t, void (*body)(void*, int64_t, int64_t), void* context) {
    body(context, 0, n);
  };
  return {run, 1};
}

}  // namespace wgpt

// What Python can ask of the library of ops: build facts, and the CPU target.
//
// This is all that is tied to a version of Python, and no tensor passes through it. The ops are in
// a library of their own (libwgpt_ops, csrc/ops), which loading this module loads.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/headeronly/version.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/cpu/dispatch/exported.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["torch"] = TORCH_VERSION;
  info["torch_target"] = "2.10";
  info["compiler"] = WGPT_COMPILER;
  const wgpt::CudaBuild cuda = wgpt::cuda_build();
  info["cuda_archs"] = cuda.archs;
  info["cuda_ptx"] = cuda.ptx;
  info["cuda_toolkit"] = cuda.toolkit;
  return info;
}

std::vector<std::string> cpu_targets() {
  std::vector<std::string> names;
  for (auto target = wgpt::cpu::available(); *target != nullptr; ++target)
    names.emplace_back((*target)->target);
  return names;
}

void set_cpu_target(const std::optional<std::string>& name) {
  wgpt::cpu::set_active(name.has_value() ? name->c_str() : nullptr);
}

double cpu_peak_flops(const std::string& dtype) {
  using wgpt::DType;
  if (dtype == "fp32") return wgpt::cpu::peak_flops(DType::kFloat32);
  if (dtype == "bf16") return wgpt::cpu::peak_flops(DType::kBFloat16);
  if (dtype == "fp16") return wgpt::cpu::peak_flops(DType::kFloat16);
  throw std::invalid_argument("cpu_peak_flops: dtype must be fp32, bf16 or fp16, got " + dtype);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "wgpt's compiled ops; importing it registers torch.ops.wgpt.* (import torch first).";
  m.def("build_info", &build_info,
        "What this binary was built with: torch, compiler, CUDA toolkit, machine code and PTX.");
  m.def("cpu_targets", &cpu_targets,
        "CPU targets compiled in that this machine can run, best first.");
  m.def(
      "cpu_target", [] { return std::string(wgpt::cpu::active().target); },
      "The CPU target in use.");
  m.def("cpu_peak_flops", &cpu_peak_flops, py::arg("dtype"),
        "FLOP/s of one thread's multiply-adds in registers, for fp32, bf16 or fp16.");
  m.def("set_cpu_target", &set_cpu_target, py::arg("name").none(true),
        "Forces a CPU target by name; None goes back to the best one.");
}

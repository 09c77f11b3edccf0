// The error of a failed allocation, in kernels and ops alike.
#pragma once

#include <new>
#include <string>
#include <utility>

namespace wgpt {

// Says of which tensor, of how many bytes and where. Python sees a MemoryError.
class OutOfMemory : public std::bad_alloc {
 public:
  explicit OutOfMemory(std::string message) : message_(std::move(message)) {}
  const char* what() const noexcept override { return message_.c_str(); }

 private:
  std::string message_;
};

}  // namespace wgpt

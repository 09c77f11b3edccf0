// What is known of kernels and their launches: how much shared memory a kernel has asked for, and who was launched.
#include <cxxabi.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>

#include "simt/machine.h"

namespace simt {

const void* current_stream = nullptr;

namespace {

struct Known {
  size_t dynamic_limit = 0;
  std::string name;
};

std::map<const void*, Known>& kernels() {
  static auto& all = *new std::map<const void*, Known>;
  return all;
}

bool recording = false;
std::deque<LaunchRecord> records;

std::string name_of(const void* kernel) {
  Dl_info info;
  if (dladdr(const_cast<void*>(kernel), &info) == 0 || info.dli_saddr != kernel) {
    char text[64];
    std::snprintf(text, sizeof(text), "the kernel at %p", kernel);
    return text;
  }
  int status = 0;
  char* plain = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status);
  const std::string name = status == 0 ? plain : info.dli_sname;
  std::free(plain);
  return name;
}

}  // namespace

bool allow_shared(const void* kernel, size_t bytes) {
  if (bytes > kSharedLimit) return false;
  kernels()[kernel].dynamic_limit = bytes;
  return true;
}

size_t dynamic_limit(const void* kernel) { return kernels()[kernel].dynamic_limit; }

void record_launches(bool on) {
  recording = on;
  records.clear();
}

size_t n_launches() { return records.size(); }

const LaunchRecord& launch_record(size_t index) { return records[index]; }

void note_launch(const void* kernel, Dim3 grid, Dim3 block, size_t shared_bytes) {
  if (!recording) return;
  std::string& name = kernels()[kernel].name;
  if (name.empty()) name = name_of(kernel);
  records.push_back({name.c_str(), grid, block, shared_bytes});
}

}  // namespace simt

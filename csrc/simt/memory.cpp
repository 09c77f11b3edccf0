// Tensors in an arena and shared memory, both between red zones; checked accesses; asynchronous copies.
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>

#include "simt/machine.h"

namespace simt {
namespace {

// A tensor between its two red zones, which reach from kRedZone before `begin` to `limit`.
struct Tensor {
  size_t begin, end, limit;
  size_t block() const { return begin - kRedZone; }
};

struct Arena {
  unsigned char* base = nullptr;
  size_t size = 0, used = 0, last = 0;
  std::vector<Tensor> tensors;                        // ascending
  std::map<size_t, std::vector<size_t>> free_blocks;  // by size
};
Arena& arena = *new Arena;  // never destroyed: tensors may be freed while the program ends

constexpr size_t kPoisonLimit = size_t{64} << 20;
// Red zones around the regions and room for a few static arrays beyond the limit that launch() checks.
constexpr size_t kSharedSpace = kSharedLimit + 64 * 1024;

bool map_arena() {
  for (size_t size = size_t{64} << 30; size >= size_t{64} << 20; size /= 4) {
    void* base = mmap(nullptr, size, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) continue;
    arena.base = static_cast<unsigned char*>(base);
    arena.size = size;
    return true;
  }
  return false;
}

const unsigned char* touched(const unsigned char* begin, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) {
    if (begin[i] != kRedByte) return begin + i;
  }
  return nullptr;
}

std::vector<Tensor>::iterator first_behind(size_t offset) {
  return std::upper_bound(arena.tensors.begin(), arena.tensors.end(), offset,
                          [](size_t at, const Tensor& tensor) { return at < tensor.begin; });
}

const Tensor* tensor_at(size_t offset) {
  if (arena.last < arena.tensors.size()) {
    const Tensor& last = arena.tensors[arena.last];
    if (offset >= last.begin && offset < last.end) return &last;
  }
  auto after = first_behind(offset);
  if (after == arena.tensors.begin()) return nullptr;
  --after;
  if (offset >= after->end) return nullptr;
  arena.last = static_cast<size_t>(after - arena.tensors.begin());
  return &*after;
}

void land(const PendingCopy& copy) {
  std::memcpy(copy.to, copy.from, copy.source_bytes);
  std::memset(copy.to + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
}

}  // namespace

const unsigned char* arena_base() { return arena.base; }
size_t arena_bytes() { return arena.size; }
bool in_arena(const void* p) {
  return arena.base != nullptr && p >= arena.base && p < arena.base + arena.size;
}

bool tensor_range(const void* p, size_t bytes) {
  const size_t offset = static_cast<size_t>(static_cast<const unsigned char*>(p) - arena.base);
  const Tensor* tensor = tensor_at(offset);
  return tensor != nullptr && offset + bytes <= tensor->end;
}

void* allocate(size_t bytes) {
  const std::lock_guard lock(one_at_a_time);
  if (arena.base == nullptr && !map_arena()) return nullptr;
  const size_t block_bytes = kRedZone + (bytes + kRedZone + 255) / 256 * 256;
  std::vector<size_t>& free_blocks = arena.free_blocks[block_bytes];
  size_t block = arena.used;
  if (!free_blocks.empty()) {
    block = free_blocks.back();
    free_blocks.pop_back();
  } else {
    if (block + block_bytes > arena.size) return nullptr;
    arena.used += block_bytes;
  }
  const Tensor tensor = {block + kRedZone, block + kRedZone + bytes, block + block_bytes};
  std::memset(arena.base + block, kRedByte, kRedZone);
  if (bytes <= kPoisonLimit) std::memset(arena.base + tensor.begin, kPoison, bytes);
  std::memset(arena.base + tensor.end, kRedByte, tensor.limit - tensor.end);
  arena.tensors.insert(first_behind(tensor.begin), tensor);
  return arena.base + tensor.begin;
}

void free(void* p) {
  const std::lock_guard lock(one_at_a_time);
  const size_t begin = static_cast<size_t>(static_cast<unsigned char*>(p) - arena.base);
  const auto at =
      std::lower_bound(arena.tensors.begin(), arena.tensors.end(), begin,
                       [](const Tensor& tensor, size_t wanted) { return tensor.begin < wanted; });
  if (at == arena.tensors.end() || at->begin != begin) fail("free: %s is no tensor", describe(p));
  const size_t bytes = at->end - begin;
  if (bytes <= kPoisonLimit) {
    std::memset(p, kPoison, bytes);  // who reads it still, reads NaN
  } else {
    madvise(arena.base + (begin + 4095) / 4096 * 4096, bytes / 4096 * 4096 - 4096, MADV_DONTNEED);
  }
  arena.free_blocks[at->limit - at->block()].push_back(at->block());
  arena.tensors.erase(at);
}

void free_all() {
  const std::lock_guard lock(one_at_a_time);
  if (arena.used > 0) madvise(arena.base, (arena.used + 4095) / 4096 * 4096, MADV_DONTNEED);
  arena.used = arena.last = 0;
  arena.tensors.clear();
  arena.free_blocks.clear();
}

bool in_shared(const void* p) { return p >= machine.shared && p < machine.shared + kSharedSpace; }

const char* describe(const void* p) {
  static char text[160];
  const unsigned char* at = static_cast<const unsigned char*>(p);
  if (in_shared(p)) {
    const size_t offset = static_cast<size_t>(at - machine.shared);
    const Region* near = nullptr;
    for (const Region& region : machine.regions) {
      if (near == nullptr || region.begin <= offset) near = &region;
    }
    std::snprintf(text, sizeof(text), "byte %lld of %s shared array of %zu bytes",
                  static_cast<long long>(offset) - static_cast<long long>(near->begin),
                  near->key == nullptr ? "the dynamic" : "a static", near->end - near->begin);
  } else if (in_arena(p)) {
    const size_t offset = static_cast<size_t>(at - arena.base);
    size_t nearest = 0;
    long long best = -1;
    for (size_t i = 0; i < arena.tensors.size(); ++i) {
      const Tensor& t = arena.tensors[i];
      const long long distance = offset < t.begin ? static_cast<long long>(t.begin - offset)
                                 : offset < t.end ? 0
                                                  : static_cast<long long>(offset - t.end + 1);
      if (best < 0 || distance < best) {
        best = distance;
        nearest = i;
      }
    }
    if (best < 0) return "memory of no tensor";
    const Tensor& t = arena.tensors[nearest];
    std::snprintf(text, sizeof(text), "byte %lld of tensor %zu, which has %zu bytes",
                  static_cast<long long>(offset) - static_cast<long long>(t.begin), nearest,
                  t.end - t.begin);
  } else {
    std::snprintf(text, sizeof(text), "address %p, which is in no tensor and not in shared memory",
                  p);
  }
  return text;
}

void check_access(const void* p, size_t bytes, bool write, size_t align, const char* what) {
  if (reinterpret_cast<uintptr_t>(p) % align != 0) {
    fail("%s: %zu-byte %s not aligned to %zu, at %s", what, bytes, write ? "write" : "read", align,
         describe(p));
  }
  bool good = false;
  if (in_shared(p)) {
    const size_t offset =
        static_cast<size_t>(static_cast<const unsigned char*>(p) - machine.shared);
    for (const Region& region : machine.regions)
      good |= offset >= region.begin && offset + bytes <= region.end;
  } else if (in_arena(p)) {
    good = tensor_range(p, bytes);
  }
  if (!good)
    fail("%s: %zu-byte %s out of bounds, at %s", what, bytes, write ? "write" : "read",
         describe(p));
}

// ---- shared memory of a block ----------------------------------------------------------------------------------------

namespace {

unsigned char* add_region(const void* key, size_t bytes, size_t align) {
  const size_t begin = (machine.shared_used + kRedZone + align - 1) / align * align;
  if (begin + bytes + kRedZone > kSharedSpace) return nullptr;
  std::memset(machine.shared + machine.shared_used, kRedByte, begin - machine.shared_used);
  std::memset(machine.shared + begin, kPoison, bytes);
  std::memset(machine.shared + begin + bytes, kRedByte, kRedZone);
  machine.shared_used = begin + bytes;
  machine.regions.push_back({key, begin, begin + bytes});
  return machine.shared + begin;
}

}  // namespace

void start_block_memory(size_t shared_bytes) {
  if (machine.shared == nullptr) {
    machine.shared = static_cast<unsigned char*>(
        mmap(nullptr, kSharedSpace, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  }
  machine.shared_used = 0;
  machine.regions.clear();
  add_region(nullptr, shared_bytes, 1024);
}

void finish_block_memory() {
  size_t previous_end = 0;
  for (size_t i = 0; i <= machine.regions.size(); ++i) {
    const size_t next =
        i < machine.regions.size() ? machine.regions[i].begin : previous_end + kRedZone;
    const unsigned char* bad = touched(machine.shared + previous_end, next - previous_end);
    if (bad != nullptr) {
      machine.failed = true;
      machine.report = std::string("a block wrote out of bounds, at ") + describe(bad);
      return;
    }
    if (i < machine.regions.size()) previous_end = machine.regions[i].end;
  }
  for (int i = 0; i < machine.n_threads; ++i) {
    const Thread& thread = *machine.threads[i];
    size_t left = thread.open_group.size();
    for (const auto& group : thread.groups) left += group.size();
    if (left == 0) continue;
    machine.failed = true;
    machine.report = "thread " + std::to_string(i) + " returned with " + std::to_string(left) +
                     " asynchronous copies that nobody waited for";
    return;
  }
}

void finish_launch_memory() {
  for (const Tensor& tensor : arena.tensors) {
    const unsigned char* bad = touched(arena.base + tensor.block(), kRedZone);
    if (bad == nullptr) bad = touched(arena.base + tensor.end, tensor.limit - tensor.end);
    if (bad == nullptr) continue;
    machine.failed = true;
    machine.report = std::string("the launch wrote out of bounds, at ") + describe(bad);
    return;
  }
}

void* dynamic_shared() { return machine.shared + machine.regions[0].begin; }

void* static_shared(const void* key, size_t bytes, size_t align) {
  for (const Region& region : machine.regions) {
    if (region.key == key) return machine.shared + region.begin;
  }
  size_t static_bytes = bytes;
  for (const Region& region : machine.regions) {
    if (region.key != nullptr) static_bytes += region.end - region.begin;
  }
  const size_t dynamic_bytes = machine.regions[0].end - machine.regions[0].begin;
  if (static_bytes > kSharedWithoutOptIn) {
    fail("%zu bytes of static shared memory, and a kernel may have 48 KiB", static_bytes);
  }
  const size_t limit = machine.dynamic_limit == 0 ? kSharedWithoutOptIn : kSharedLimit;
  if (static_bytes + dynamic_bytes > limit) {
    fail("%zu bytes of static and %zu of dynamic shared memory, and a block may have %zu%s",
         static_bytes, dynamic_bytes, limit, machine.dynamic_limit == 0 ? kHowToOptIn : "");
  }
  unsigned char* array = add_region(key, bytes, std::max<size_t>(align, 16));
  if (array == nullptr) fail("static shared memory is full");
  return array;
}

// ---- accesses --------------------------------------------------------------------------------------------------------

void load(void* to, const void* from, size_t bytes) {
  check_access(from, bytes, false, bytes, "vector load");
  note_read(from, bytes);
  std::memcpy(to, from, bytes);
}

void store(void* to, const void* from, size_t bytes) {
  check_access(to, bytes, true, bytes, "vector store");
  note_write(to, bytes);
  std::memcpy(to, from, bytes);
}

void atomic_access(void* p, size_t bytes) { check_access(p, bytes, true, bytes, "atomic"); }

// ---- asynchronous copies ---------------------------------------------------------------------------------------------

void copy_async(void* shared, const void* global, size_t bytes, size_t source_bytes) {
  if (!in_shared(shared)) fail("cp.async: the destination is not shared memory");
  if (source_bytes > bytes)
    fail("cp.async: %zu source bytes for a copy of %zu", source_bytes, bytes);
  check_access(shared, bytes, true, bytes, "cp.async");
  if (source_bytes > 0) {
    ++machine.counters.copies;
    check_access(global, source_bytes, false, bytes, "cp.async");
    note_read(global, source_bytes);
  }
  check_future_write(shared, bytes);
  PendingCopy copy = {static_cast<unsigned char*>(shared),
                      static_cast<const unsigned char*>(global), static_cast<uint32_t>(bytes),
                      static_cast<uint32_t>(source_bytes), false};
  const Copies when = machine.policy.copies;
  if (when == Copies::kEarly || (when == Copies::kMixed && random_bits() % 2 == 0)) {
    land(copy);
    copy.done = true;
  }
  machine.running->open_group.push_back(copy);
}

void copy_async_commit() {
  Thread& self = *machine.running;
  self.groups.push_back(std::move(self.open_group));
  self.open_group.clear();
}

void copy_async_wait(int groups_left) {
  Thread& self = *machine.running;
  while (self.groups.size() > static_cast<size_t>(groups_left)) {
    for (const PendingCopy& copy : self.groups.front()) {
      if (!copy.done) land(copy);
      note_write(copy.to, copy.bytes);
    }
    self.groups.erase(self.groups.begin());
  }
}

}  // namespace simt

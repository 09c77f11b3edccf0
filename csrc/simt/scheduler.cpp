// Grids, blocks and warps: who runs when, where they wait, and what to say when nobody can go on.
#include <algorithm>
#include <cstdarg>
#include <cstdio>

#include "simt/machine.h"

namespace simt {

Machine machine;
std::mutex one_at_a_time;
ThreadView* current_view = nullptr;

void set_policy(const Policy& policy) { machine.policy = policy; }
const Counters& counters() { return machine.counters; }
void reset_counters() { machine.counters = Counters{}; }

uint64_t random_bits() {  // splitmix64
  uint64_t z = machine.random_state += 0x9e3779b97f4a7c15ull;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ z >> 27) * 0x94d049bb133111ebull;
  return z ^ z >> 31;
}

namespace {

// The order in which n things are visited this time.
void visiting_order(int n, std::vector<int>* order) {
  order->resize(static_cast<size_t>(n));
  for (int i = 0; i < n; ++i)
    (*order)[i] = machine.policy.order == Order::kDescending ? n - 1 - i : i;
  if (machine.policy.order == Order::kRandom || machine.policy.order == Order::kInterleaved) {
    for (int i = n - 1; i > 0; --i) {
      std::swap((*order)[i], (*order)[random_bits() % static_cast<uint64_t>(i + 1)]);
    }
  }
}

void thread_main() {
  machine.body(machine.context);
  Thread& self = *machine.running;
  self.state = State::kDone;
  ++machine.n_done;
  yield();
  __builtin_trap();  // a finished thread is never resumed
}

void resume(Thread& thread) {
  machine.running = &thread;
  current_view = &thread.view;
  ++machine.counters.switches;
  switch_fiber(machine.scheduler, thread.fiber);
  machine.running = nullptr;
}

void append(std::string* text, const char* format, ...) __attribute__((format(printf, 2, 3)));
void append(std::string* text, const char* format, ...) {
  char line[512];
  va_list args;
  va_start(args, format);
  std::vsnprintf(line, sizeof(line), format, args);
  va_end(args);
  *text += line;
}

// Nobody can run: lists who waits where, warp by warp.
void report_deadlock() {
  std::string text;
  append(&text, "deadlock in block (%u,%u,%u): no thread can go on.", machine.block_index.x,
         machine.block_index.y, machine.block_index.z);
  int listed = 0;
  for (int w = 0; w < machine.n_warps && listed < 8; ++w) {
    Warp& warp = machine.warps[w];
    unsigned seen = 0;
    for (int lane = 0; lane < warp.n_lanes; ++lane) {
      if (seen >> lane & 1) continue;
      const Thread& first = *machine.threads[warp.first + lane];
      unsigned group = 0;
      for (int other = lane; other < warp.n_lanes; ++other) {
        const Thread& thread = *machine.threads[warp.first + other];
        if (thread.state == first.state && thread.waits_at == first.waits_at) group |= 1u << other;
      }
      seen |= group;
      if (first.state == State::kDone) {
        append(&text, " Warp %d lanes 0x%08x have returned.", w, group);
      } else {
        append(&text, " Warp %d lanes 0x%08x wait at %s.", w, group, first.waits_at);
      }
      ++listed;
    }
  }
  machine.failed = true;
  machine.report = text;
}

// Lets every ready lane of the warp run until it waits; true if any did.
bool run_warp_turn(const Warp& warp, std::vector<int>* order) {
  visiting_order(warp.n_lanes, order);
  bool any = false;
  for (int lane : *order) {
    Thread& thread = *machine.threads[warp.first + lane];
    if (thread.state != State::kReady) continue;
    resume(thread);
    any = true;
    if (machine.failed) return true;
  }
  return any;
}

void release_block_barrier() {
  for (int i = 0; i < machine.n_threads; ++i) {
    Thread& thread = *machine.threads[i];
    if (thread.state == State::kAtBlock) thread.state = State::kReady;
  }
  machine.n_at_block = 0;
  machine.last_predicate_sum = machine.predicate_sum;
  machine.predicate_sum = 0;
  ++machine.block_epoch;
}

void run_block(size_t shared_bytes) {
  ++machine.counters.blocks;
  ++machine.block_serial;
  ++machine.block_epoch;
  start_block_memory(shared_bytes);
  machine.n_done = machine.n_at_block = machine.predicate_sum = 0;
  for (int i = 0; i < machine.n_threads; ++i) {
    Thread& thread = *machine.threads[i];
    const Dim3& dim = machine.block_dim;
    thread.index = i;
    thread.lane = i % 32;
    thread.warp = i / 32;
    const unsigned u = static_cast<unsigned>(i);
    thread.view = {Dim3(u % dim.x, u / dim.x % dim.y, u / (dim.x * dim.y)), machine.block_index,
                   dim, machine.grid};
    thread.state = State::kReady;
    thread.open_group.clear();
    thread.groups.clear();
    if (!prepare_fiber(thread.fiber, thread_main)) {
      machine.failed = true;
      machine.report = "no memory for a fiber's stack";
      return;
    }
  }
  for (int w = 0; w < machine.n_warps; ++w) {
    Warp& warp = machine.warps[w];
    warp.first = w * 32;
    warp.n_lanes = std::min(32, machine.n_threads - warp.first);
    for (Meeting& meeting : warp.meetings) meeting.mask = 0;
  }
  std::vector<int> warp_order, lane_order;
  const bool interleaved = machine.policy.order == Order::kInterleaved;
  while (machine.n_done < machine.n_threads && !machine.failed) {
    bool progress = false;
    visiting_order(machine.n_warps, &warp_order);
    for (int w : warp_order) {
      while (run_warp_turn(machine.warps[w], &lane_order)) {
        progress = true;
        if (machine.failed || interleaved) break;
      }
      if (machine.failed) break;
    }
    if (machine.failed || machine.n_done == machine.n_threads) break;
    if (machine.n_at_block > 0 && machine.n_at_block + machine.n_done == machine.n_threads) {
      release_block_barrier();
    } else if (!progress) {
      report_deadlock();
    }
  }
  if (!machine.failed) finish_block_memory();
}

}  // namespace

void yield() { switch_fiber(machine.running->fiber, machine.scheduler); }

void fail(const char* format, ...) {
  std::string text;
  Thread* self = machine.running;
  if (self != nullptr) {
    append(&text, "block (%u,%u,%u) thread %d (warp %d lane %d): ", machine.block_index.x,
           machine.block_index.y, machine.block_index.z, self->index, self->warp, self->lane);
  }
  char line[768];
  va_list args;
  va_start(args, format);
  std::vsnprintf(line, sizeof(line), format, args);
  va_end(args);
  if (!machine.failed) machine.report = text + line;  // the first mistake counts
  machine.failed = true;
  if (self == nullptr) {
    std::fprintf(stderr, "simt: %s\n", machine.report.c_str());
    __builtin_trap();
  }
  yield();
  __builtin_trap();
}

void meet(const char* name, unsigned mask, void* operand, void (*execute)(Meeting&, Warp&)) {
  Thread& self = *machine.running;
  Warp& warp = machine.warps[self.warp];
  if ((mask >> self.lane & 1) == 0)
    fail("calls %s with mask 0x%08x, which leaves the caller out", name, mask);
  Meeting* place = nullptr;
  Meeting* free_place = nullptr;
  for (Meeting& meeting : warp.meetings) {
    if (meeting.mask == 0) {
      if (free_place == nullptr) free_place = &meeting;
    } else if (meeting.mask == mask) {
      place = &meeting;
      break;
    } else if ((meeting.mask & mask) != 0) {
      fail("calls %s with mask 0x%08x while lanes 0x%08x wait at %s with mask 0x%08x", name, mask,
           meeting.arrived, meeting.name, meeting.mask);
    }
  }
  if (place == nullptr) {
    place = free_place;
    place->mask = mask;
    place->arrived = 0;
    place->name = name;
  }
  if (place->name != name) {
    fail("calls %s while lanes 0x%08x of its warp wait at %s: the warp has diverged", name,
         place->arrived, place->name);
  }
  place->operand[self.lane] = operand;
  place->arrived |= 1u << self.lane;
  const unsigned present = warp.n_lanes == 32 ? 0xffffffffu : (1u << warp.n_lanes) - 1;
  if (place->arrived == (place->mask & present)) {
    ++machine.counters.collectives;
    execute(*place, warp);
    for (int lane = 0; lane < warp.n_lanes; ++lane) {
      Thread& other = *machine.threads[warp.first + lane];
      if ((place->arrived >> lane & 1) != 0 && &other != &self) other.state = State::kReady;
    }
    place->mask = 0;
    return;
  }
  self.state = State::kAtWarp;
  self.waits_at = name;
  yield();
}

int sync_threads_count(int predicate) {
  Thread& self = *machine.running;
  self.state = State::kAtBlock;
  self.waits_at = "__syncthreads";
  ++machine.n_at_block;
  machine.predicate_sum += predicate != 0;
  yield();
  return machine.last_predicate_sum;
}

void sync_threads() { sync_threads_count(0); }

const char* run_grid(const void* kernel, Dim3 grid, Dim3 block, size_t shared_bytes,
                     void (*body)(void*), void* context) {
  static std::string last_report;
  const std::lock_guard lock(one_at_a_time);
  const uint64_t n_blocks = grid.count(), n_threads = block.count();
  if (n_blocks == 0) return "a grid without blocks";
  if (n_threads == 0 || n_threads > 1024) return "a block must have 1 to 1024 threads";
  if (grid.y > 65535 || grid.z > 65535 || grid.x > 0x7fffffffu)
    return "a grid dimension is too large";
  if (shared_bytes > kSharedLimit) return "more than 227 KiB of dynamic shared memory";
  machine.dynamic_limit = dynamic_limit(kernel);
  if (shared_bytes > std::max(machine.dynamic_limit, kSharedWithoutOptIn)) {
    last_report =
        std::to_string(shared_bytes) + " bytes of dynamic shared memory, and the kernel may have " +
        std::to_string(std::max(machine.dynamic_limit, kSharedWithoutOptIn)) + kHowToOptIn;
    return last_report.c_str();
  }
  note_launch(kernel, grid, block, shared_bytes);
  ++machine.counters.launches;
  ++machine.launch_serial;
  machine.failed = false;
  machine.report.clear();
  machine.random_state = machine.policy.seed * 0x2545f4914f6cdd1dull + 1;
  machine.grid = grid;
  machine.block_dim = block;
  machine.body = body;
  machine.context = context;
  machine.n_threads = static_cast<int>(n_threads);
  machine.n_warps = (machine.n_threads + 31) / 32;
  while (machine.threads.size() < n_threads) machine.threads.push_back(new Thread());
  if (machine.warps.size() < static_cast<size_t>(machine.n_warps))
    machine.warps.resize(machine.n_warps);
  std::vector<int> order;
  visiting_order(static_cast<int>(n_blocks), &order);
  for (int b : order) {
    const unsigned u = static_cast<unsigned>(b);
    machine.block_index = Dim3(u % grid.x, u / grid.x % grid.y, u / grid.x / grid.y);
    run_block(shared_bytes);
    if (machine.failed) break;
  }
  if (!machine.failed) finish_launch_memory();
  last_report = machine.report;
  return machine.failed ? last_report.c_str() : nullptr;
}

}  // namespace simt

// The emulator itself behind a C interface; included once per library that the tests build.
#pragma once

#include "simt/simt.h"

extern "C" {
void* simt_allocate(size_t bytes) { return simt::allocate(bytes); }
void simt_free(void* tensor) { simt::free(tensor); }
void simt_free_all() { simt::free_all(); }
void simt_set_policy(int order, int copies, uint64_t seed, int cores) {
  simt::set_policy({static_cast<simt::Order>(order), static_cast<simt::Copies>(copies), seed,
                    static_cast<simt::Cores>(cores)});
}
void simt_reset_counters() { simt::reset_counters(); }
void simt_record_launches(int on) { simt::record_launches(on != 0); }
size_t simt_n_launches() { return simt::n_launches(); }
// sizes: grid, block, bytes of dynamic shared memory
const char* simt_launch_record(size_t index, uint64_t sizes[7]) {
  const simt::LaunchRecord& record = simt::launch_record(index);
  const simt::Dim3 dims[2] = {record.grid, record.block};
  for (int i = 0; i < 2; ++i) {
    sizes[3 * i] = dims[i].x;
    sizes[3 * i + 1] = dims[i].y;
    sizes[3 * i + 2] = dims[i].z;
  }
  sizes[6] = record.shared_bytes;
  return record.kernel;
}
// launches, blocks, switches, collectives, mmas, bank_conflicts, copies
void simt_counters(uint64_t out[7]) {
  const simt::Counters& c = simt::counters();
  const uint64_t values[7] = {c.launches, c.blocks,         c.switches, c.collectives,
                              c.mmas,     c.bank_conflicts, c.copies};
  for (int i = 0; i < 7; ++i) out[i] = values[i];
}
}

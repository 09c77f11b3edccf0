// The emulator itself behind a C interface; included once per library that the tests build.
#pragma once

#include "simt/simt.h"

extern "C" {
void* simt_allocate(size_t bytes) { return simt::allocate(bytes); }
void simt_free_all() { simt::free_all(); }
void simt_set_policy(int order, int copies, uint64_t seed, int cores) {
  simt::set_policy({static_cast<simt::Order>(order), static_cast<simt::Copies>(copies), seed,
                    static_cast<simt::Cores>(cores)});
}
void simt_set_multiprocessors(int n) { simt::multiprocessors = n; }
void simt_reset_counters() { simt::reset_counters(); }
// launches, blocks, switches, collectives, mmas, bank_conflicts, copies
void simt_counters(uint64_t out[7]) {
  const simt::Counters& c = simt::counters();
  const uint64_t values[7] = {c.launches, c.blocks,         c.switches, c.collectives,
                              c.mmas,     c.bank_conflicts, c.copies};
  for (int i = 0; i < 7; ++i) out[i] = values[i];
}
}

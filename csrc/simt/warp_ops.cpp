// What a warp does together: barrier, shuffles, votes, ldmatrix and mma with the fragment layouts of the PTX ISA.
#include <cstring>

#include "simt/machine.h"
#include "simt/numbers.h"
#include "simt/tensor_core.h"

namespace simt {
namespace {

template <typename Body>
void for_each_lane(const Meeting& meeting, const Body& body) {
  for (int lane = 0; lane < 32; ++lane) {
    if (meeting.arrived >> lane & 1) body(lane);
  }
}

struct ShuffleOperand {
  uint32_t value, result;
  int source;  // lane of the warp whose value this lane wants
};

void execute_shuffle(Meeting& meeting, Warp&) {
  for_each_lane(meeting, [&](int lane) {
    auto* mine = static_cast<ShuffleOperand*>(meeting.operand[lane]);
    if ((meeting.arrived >> mine->source & 1) == 0) {
      fail("%s: lane %d reads lane %d, which does not take part", meeting.name, lane, mine->source);
    }
    mine->result = static_cast<ShuffleOperand*>(meeting.operand[mine->source])->value;
  });
}

uint32_t shuffle_from(unsigned mask, uint32_t value, int source, const char* name) {
  ShuffleOperand operand = {value, 0, source};
  meet(name, mask, &operand, execute_shuffle);
  return operand.result;
}

void check_width(int width, const char* name) {
  if (width < 1 || width > 32 || (width & (width - 1)) != 0)
    fail("%s: width %d is no power of two", name, width);
}

struct VoteOperand {
  uint32_t value, result;
};

// The 16 x 16 A, 16 x 8 B and 16 x 8 C of a warp, as lanes hold them; g = lane / 4, t = lane % 4.
//
//   16-bit A: registers 0..3 hold (g, 2t+{0,1}) (g+8, 2t+{0,1}) (g, 2t+8+{0,1}) (g+8, 2t+8+{0,1})
//   16-bit B: registers 0..1 hold (k = 2t+{0,1}, n = g) (k = 2t+8+{0,1}, n = g)
//   tf32 A (16 x 8): (g, t) (g+8, t) (g, t+4) (g+8, t+4)     tf32 B (8 x 8): (k = t, n = g) (k = t+4, n = g)
//   C and D:  (g, 2t) (g, 2t+1) (g+8, 2t) (g+8, 2t+1)
struct MmaOperand {
  const uint32_t *a, *b;
  const float* c;
  float* d;
};

float half_of(uint32_t reg, int which, bool bf16) {
  const uint16_t bits = static_cast<uint16_t>(which == 0 ? reg : reg >> 16);
  return bf16 ? bf16_to_float(bits) : half_to_float(bits);
}

// `lowest` is the exponent of the smallest normal number of a and b's format.
template <int K>
void multiply(Meeting& meeting, const float (&a)[16][K], const float (&b)[K][8], int lowest) {
  float c[16][8];
  for_each_lane(meeting, [&](int lane) {
    const auto* o = static_cast<MmaOperand*>(meeting.operand[lane]);
    for (int i = 0; i < 4; ++i) c[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2] = o->c[i];
  });
  if (machine.policy.cores == Cores::kAmpere) {
    multiply_add<K, K / 2>(kAmpereCore, a, b, lowest, c);
  } else {
    multiply_add<K, K>(kHopperCore, a, b, lowest, c);
  }
  for_each_lane(meeting, [&](int lane) {
    const auto* o = static_cast<MmaOperand*>(meeting.operand[lane]);
    for (int i = 0; i < 4; ++i) o->d[i] = c[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  });
  ++machine.counters.mmas;
}

template <bool kBf16>
void execute_mma16(Meeting& meeting, Warp&) {
  float a[16][16], b[16][8];
  for_each_lane(meeting, [&](int lane) {
    const auto* o = static_cast<MmaOperand*>(meeting.operand[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int r = 0; r < 4; ++r) {
      for (int h = 0; h < 2; ++h)
        a[g + r % 2 * 8][2 * t + r / 2 * 8 + h] = half_of(o->a[r], h, kBf16);
    }
    for (int r = 0; r < 2; ++r) {
      for (int h = 0; h < 2; ++h) b[2 * t + r * 8 + h][g] = half_of(o->b[r], h, kBf16);
    }
  });
  multiply<16>(meeting, a, b, kBf16 ? -126 : -14);
}

void execute_mma_tf32(Meeting& meeting, Warp&) {
  float a[16][8], b[8][8];
  const auto cut = [](uint32_t bits) {
    return bits_float(bits & 0xffffe000u);
  };  // the unit ignores the low 13 bits
  for_each_lane(meeting, [&](int lane) {
    const auto* o = static_cast<MmaOperand*>(meeting.operand[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int r = 0; r < 4; ++r) a[g + r % 2 * 8][t + r / 2 * 4] = cut(o->a[r]);
    for (int r = 0; r < 2; ++r) b[t + r * 4][g] = cut(o->b[r]);
  });
  multiply<8>(meeting, a, b, -126);
}

struct LdmatrixOperand {
  const unsigned char* row;
  uint32_t* out;
  int n_matrices;
  bool transposed;
};

void execute_ldmatrix(Meeting& meeting, Warp&) {
  const auto* first = static_cast<LdmatrixOperand*>(meeting.operand[0]);
  for (int i = 0; i < first->n_matrices; ++i) {
    uint16_t tile[8][8];
    unsigned banks_used[32] = {};
    for (int r = 0; r < 8; ++r) {
      const unsigned char* row = static_cast<LdmatrixOperand*>(meeting.operand[8 * i + r])->row;
      std::memcpy(tile[r], row, 16);
      const size_t word = static_cast<size_t>(row - machine.shared) / 4;
      for (int w = 0; w < 4; ++w) ++banks_used[(word + w) % 32];
    }
    unsigned passes = 0;
    for (unsigned uses : banks_used) passes = uses > passes ? uses : passes;
    machine.counters.bank_conflicts +=
        passes - 1;  // rows of one address would be broadcast; kernels here have none
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      const uint32_t low = first->transposed ? tile[2 * t][g] : tile[g][2 * t];
      const uint32_t high = first->transposed ? tile[2 * t + 1][g] : tile[g][2 * t + 1];
      static_cast<LdmatrixOperand*>(meeting.operand[lane])->out[i] = low | high << 16;
    }
  }
}

}  // namespace

void sync_warp(unsigned mask) {
  meet("__syncwarp", mask, nullptr, [](Meeting& meeting, Warp& warp) {
    const unsigned present = warp.n_lanes == 32 ? 0xffffffffu : (1u << warp.n_lanes) - 1;
    unsigned alive = 0;
    for (int lane = 0; lane < warp.n_lanes; ++lane) {
      if (machine.threads[warp.first + lane]->state != State::kDone) alive |= 1u << lane;
    }
    if ((meeting.arrived & alive & present) == (alive & present))
      ++warp.epoch;  // orders the warp for the race checker
  });
}

uint32_t shuffle(unsigned mask, uint32_t value, int lane, int width, const char* name) {
  check_width(width, name);
  const int self = machine.running->lane;
  return shuffle_from(mask, value, (self & ~(width - 1)) | (lane & (width - 1)), name);
}

uint32_t shuffle_xor(unsigned mask, uint32_t value, int bits, int width) {
  constexpr const char* kName = "__shfl_xor_sync";
  check_width(width, kName);
  const int self = machine.running->lane, source = self ^ bits;
  // Beyond the own segment upwards the value stays; downwards it is read, as on the device.
  return shuffle_from(mask, value, source > (self | (width - 1)) ? self : source, kName);
}

uint32_t shuffle_up(unsigned mask, uint32_t value, int delta, int width) {
  constexpr const char* kName = "__shfl_up_sync";
  check_width(width, kName);
  const int self = machine.running->lane, source = self - delta;
  return shuffle_from(mask, value, source < (self & ~(width - 1)) ? self : source, kName);
}

uint32_t shuffle_down(unsigned mask, uint32_t value, int delta, int width) {
  constexpr const char* kName = "__shfl_down_sync";
  check_width(width, kName);
  const int self = machine.running->lane, source = self + delta;
  return shuffle_from(mask, value, source > (self | (width - 1)) ? self : source, kName);
}

unsigned ballot(unsigned mask, int predicate) {
  VoteOperand operand = {predicate != 0, 0};
  meet("a vote", mask, &operand, [](Meeting& meeting, Warp&) {
    uint32_t votes = 0;
    for_each_lane(meeting, [&](int lane) {
      votes |= static_cast<VoteOperand*>(meeting.operand[lane])->value << lane;
    });
    for_each_lane(meeting, [&](int lane) {
      static_cast<VoteOperand*>(meeting.operand[lane])->result = votes;
    });
  });
  return operand.result;
}

unsigned match_any(unsigned mask, uint32_t value) {
  VoteOperand operand = {value, 0};
  meet("__match_any_sync", mask, &operand, [](Meeting& meeting, Warp&) {
    for_each_lane(meeting, [&](int lane) {
      auto* mine = static_cast<VoteOperand*>(meeting.operand[lane]);
      mine->result = 0;
      for_each_lane(meeting, [&](int other) {
        if (static_cast<VoteOperand*>(meeting.operand[other])->value == mine->value)
          mine->result |= 1u << other;
      });
    });
  });
  return operand.result;
}

void ldmatrix(uint32_t* out, const void* row, int n_matrices, bool transposed) {
  if (machine.running->lane < 8 * n_matrices) {
    if (!in_shared(row))
      fail("ldmatrix: the row address is not in shared memory: %s", describe(row));
    check_access(row, 16, false, 16, "ldmatrix");
    note_read(row, 16);
  }
  LdmatrixOperand operand = {static_cast<const unsigned char*>(row), out, n_matrices, transposed};
  static const char* const kNames[2][5] = {
      {"", "ldmatrix.x1", "ldmatrix.x2", "", "ldmatrix.x4"},
      {"", "ldmatrix.x1.trans", "ldmatrix.x2.trans", "", "ldmatrix.x4.trans"}};
  meet(kNames[transposed][n_matrices], 0xffffffffu, &operand, execute_ldmatrix);
}

void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  const float (&c)[4], MmaType type) {
  MmaOperand operand = {a, b, c, d};
  if (type == MmaType::kBf16) {
    meet("mma.m16n8k16.bf16", 0xffffffffu, &operand, execute_mma16<true>);
  } else {
    meet("mma.m16n8k16.f16", 0xffffffffu, &operand, execute_mma16<false>);
  }
}

void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                      const float (&c)[4]) {
  MmaOperand operand = {a, b, c, d};
  meet("mma.m16n8k8.tf32", 0xffffffffu, &operand, execute_mma_tf32);
}

}  // namespace simt

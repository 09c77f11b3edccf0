// mel_embed's weight as its micro-kernel reads it. Formula and shapes: kernels/mel_embed.h.
#pragma once

#include "kernels/cpu/gemm/pack.h"
#include "kernels/cpu/mel_embed/mel_embed_float64.h"

namespace wgpt::cpu::WGPT_TARGET {

// weight^T and bias as the b operand: [strip of kStrip channels][K][channel], then bias; zero past
// the last channel.
struct PackedMelWeight {
  const float *weight, *bias;
};

template <typename Element, typename Dot>
PackedMelWeight pack_mel_weight(const MelEmbedShape& shape, const void* weight, const void* bias) {
  thread_local Scratch scratch;  // of the calling thread; the others only read it
  constexpr bool kIsUnits = sizeof(Element) * Dot::kPerUnit == sizeof(float);
  const int64_t k = mel_slice_size(shape), n_units = k / Dot::kPerUnit, cm = shape.channels,
                n = round_up(cm, kStrip);
  auto* out =
      static_cast<float*>(scratch.reserve(static_cast<size_t>((k + 1) * n) * sizeof(float)));
  const int64_t n_blocks = kIsUnits ? n_units / kLanes * kLanes : 0;  // transposed by blocks
  for (int64_t c = 0; c < n; c += kLanes) {
    float* column = out + c / kStrip * kStrip * n_units + c % kStrip;
    const Element* rows = static_cast<const Element*>(weight) + c * k;
    const int64_t n_here = max_of<int64_t>(0, min_of<int64_t>(kLanes, cm - c)),
                  n_fast = n_here == kLanes ? n_blocks : 0;
    for (int64_t unit = 0; unit < n_fast; unit += kLanes)
      transpose_block(rows + unit * Dot::kPerUnit, n_units, column + unit * kStrip, kStrip);
    for (int64_t unit = n_fast; unit < n_units; ++unit) {
      clear_floats(column + unit * kStrip, kLanes);
      for (int64_t i = 0; i < n_here; ++i) {
        const Element* element = rows + i * k + unit * Dot::kPerUnit;
        if constexpr (Dot::kPerUnit == 1) {
          column[unit * kStrip + i] = widen(*element);
        } else {
          std::memcpy(column + unit * kStrip + i, element, sizeof(float));
        }
      }
    }
  }
  float* bias_out = out + k * n;
  clear_floats(bias_out, n);
  for (int64_t c = 0; c < cm; ++c) bias_out[c] = widen(static_cast<const Element*>(bias)[c]);
  return {out, bias_out};
}

}  // namespace wgpt::cpu::WGPT_TARGET

// Sizes of one weight of `winding`, and what its kernels want prepared.
#pragma once

#include <algorithm>
#include <cstdint>

#include "hyper.h"
#include "winding_steps.h"

namespace hyper {

struct WindingLayout {
  explicit WindingLayout(const hyper_winding_plan& plan)
      : pairs((plan.in_features + 1) / 2),
        groups((pairs + kPairs - 1) / kPairs),
        row_words((pairs * plan.width + 31) / 32) {}

  const int64_t pairs, groups, row_words;
};

inline WindingConstants constants_of(const hyper_winding_plan& plan, const float* centre, const float* shell_side) {
  WindingConstants made{};
  made.width = plan.width;
  made.mask = (1u << plan.width) - 1;
  made.stride = plan.num_points + 1;
  made.shells = plan.num_shells;
  made.inverse = 1.0f / static_cast<float>(made.stride);
  made.sides = shell_side;
  made.near = static_cast<int>(made.mask) / made.stride < kNearShells;
  for (int i = 0; i < kNearShells; ++i) {
    made.near_sides[i] = shell_side[std::min(i, plan.num_shells)];
    made.near_starts[i] = kFloatOne + static_cast<uint32_t>(i) * static_cast<uint32_t>(made.stride) + 1;
  }
  for (int d = 0; d < 2; ++d) {
    made.direction[d] = plan.direction[d];
    made.centre[d] = centre[d];
  }
  for (int phase = 0; phase < 2; ++phase) {
    for (int i = 0; i < kPairs; ++i) {
      const int first = 16 * phase + i * plan.width, last = first + plan.width - 1;
      made.word[phase][i] = first / 32;
      made.bit[phase][i] = static_cast<uint32_t>(first % 32);
      // The byte of the last bit and the three before it; a word holds its first byte last. Bytes before the group are
      // read only for bits above the code, so any will do.
      for (int b = 0; b < 4; ++b) {
        const int byte = std::max(last / 8 - b, 0);
        made.bytes[phase][4 * i + b] = static_cast<uint8_t>(byte / 4 * 4 + 3 - byte % 4);
      }
      made.shift[phase][i] = static_cast<uint32_t>(7 - last % 8);
    }
  }
  return made;
}

}  // namespace hyper

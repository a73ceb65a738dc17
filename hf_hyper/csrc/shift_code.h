// What a search knows about the code besides its tile: table, targets and branch costs, in integers. The units are
// defined at the top of shift_encode.cpp.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <vector>

#include "shift_observable.h"
#include "shift_steps.h"

namespace hyper {

constexpr uint16_t kNever = 65535;
constexpr uint16_t kRescaleAt = 4096;
constexpr int kScale[9] = {0, 32, 32, 48, 48, 2, 4, 8, 16};
constexpr int kMaxDistance = 255;  // of the branches from 5 bits up
constexpr int kCentre = kMaxByteSum / 2;

// Weights that a whole window spans.
inline int span(int bits) { return (kStateBits + bits - 1) / bits; }

// Everything the search needs that does not depend on the tile.
struct Code {
  int bits;
  int scale;
  int classes;     // 2^(16-bits)
  int class_bits;  // R
  Moments moments;
  std::vector<int16_t> table;    // by state
  std::vector<int16_t> blocked;  // in the order of FullStep
  int lowest_target, highest_target;

  Code(int bits_, int survivor_bits, const uint16_t* byte_sums, int scale_)
      : bits(bits_), scale(scale_), classes(1 << (kStateBits - bits_)), moments(moments_of(byte_sums)),
        table(kStates), blocked(kStates) {
    class_bits = std::max(survivor_bits, std::min(kStateBits, 2 * bits)) - bits;
    for (int state = 0; state < kStates; ++state) {
      table[state] = static_cast<int16_t>((byte_sums[state] - kCentre) * scale);
    }
    for (int state = 0; state < kStates; ++state) {
      const int h = state / classes, c = state % classes;
      blocked[((c / kBlock << bits) + h) * kBlock + c % kBlock] = table[state];
    }
    if (bits <= 4) {
      lowest_target = -32767;
      highest_target = 32767;
    } else {
      const auto range = std::minmax_element(table.begin(), table.end());
      lowest_target = *range.first - 128;
      highest_target = *range.second + 128;
    }
  }

  int16_t target(float weight) const {
    const double units = (weight * moments.deviation + moments.mean - kCentre) * scale;
    return static_cast<int16_t>(
        std::nearbyint(std::min<double>(std::max<double>(units, lowest_target), highest_target)));
  }

  // As the branch() of the steps, one state at a time.
  uint32_t branch(int state, int target) const {
    int d = table[state] - target;
    if (bits <= 4) {
      d = std::min(std::max(d, -32768), 32767);
      return static_cast<uint32_t>((d * d + (1 << 14)) >> 15);
    }
    d = std::min(std::abs(d), kMaxDistance);
    return static_cast<uint32_t>(d * d);
  }

  bool full() const { return class_bits + bits == kStateBits; }
};

inline int cheapest(const uint16_t* costs, int count) {
  return static_cast<int>(std::min_element(costs, costs + count) - costs);
}

}  // namespace hyper

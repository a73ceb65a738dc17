// The observable of `shift`: state -> byte sum of (state * multiplier mod 2^32) -> value of zero mean, unit variance.
#pragma once

#include <cstdint>

namespace hyper {

constexpr int kStateBits = 16;
constexpr int kStates = 1 << kStateBits;
constexpr int kTileWeights = 256;
constexpr int kMaxByteSum = 4 * 255;

inline int byte_sum(uint32_t state, uint32_t multiplier) {
  const uint32_t product = state * multiplier;
  return static_cast<int>((product & 255) + (product >> 8 & 255) + (product >> 16 & 255) + (product >> 24));
}

// Mean and population standard deviation of the byte sum over all states.
struct Moments {
  double mean;
  double deviation;
};

void fill_byte_sums(uint32_t multiplier, uint16_t* byte_sums);
Moments moments_of(const uint16_t* byte_sums);

}  // namespace hyper

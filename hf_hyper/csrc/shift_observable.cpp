#include "shift_observable.h"

#include <cmath>

namespace hyper {

void fill_byte_sums(uint32_t multiplier, uint16_t* byte_sums) {
  for (uint32_t state = 0; state < kStates; ++state) {
    byte_sums[state] = static_cast<uint16_t>(byte_sum(state, multiplier));
  }
}

Moments moments_of(const uint16_t* byte_sums) {
  // Integer sums, so that every build gets the same two doubles.
  int64_t sum = 0, squares = 0;
  for (int state = 0; state < kStates; ++state) {
    const int64_t value = byte_sums[state];
    sum += value;
    squares += value * value;
  }
  const int64_t spread = squares * kStates - sum * sum;  // kStates^2 * variance
  return {static_cast<double>(sum) / kStates, std::sqrt(static_cast<double>(spread)) / kStates};
}

}  // namespace hyper

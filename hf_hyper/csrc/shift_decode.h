#pragma once

#include <cstdint>

namespace hyper {

// codes [n, 8 * bits] -> tiles [n, 256], in units of value(state).
void decode_tiles(const uint32_t* codes, int64_t n, int bits, uint32_t multiplier, int threads, float* tiles);

}  // namespace hyper

#pragma once

#include <cstdint>

namespace hyper {

// tiles [n, 256] -> codes [n, 8 * bits]; all weights finite. Definition: top of shift_encode.cpp.
void encode_tiles(const float* tiles, int64_t n, int bits, int survivor_bits, const uint16_t* byte_sums, int threads,
                  uint32_t* codes);

}  // namespace hyper

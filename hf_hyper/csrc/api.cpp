// Argument checks and exception barrier of the C interface.
#include <new>

#include "hyper.h"
#include "isa.h"
#include "shift_decode.h"
#include "shift_encode.h"
#include "shift_observable.h"

namespace {

template <class Body>
int guarded(Body body) {
  try {
    body();
    return HYPER_OK;
  } catch (const std::bad_alloc&) {
    return HYPER_ERROR_MEMORY;
  }
}

bool in_range(const uint16_t* byte_sums) {
  for (int state = 0; state < hyper::kStates; ++state) {
    if (byte_sums[state] > hyper::kMaxByteSum) return false;
  }
  return true;
}

bool all_finite(const float* values, int64_t count) {
  // A NaN or an infinity makes 0 * value NaN, and NaN stays in the sum.
  float sum = 0.0f;
  for (int64_t i = 0; i < count; ++i) sum += 0.0f * values[i];
  return sum == 0.0f;
}

}  // namespace

int hyper_abi_version(void) { return 1; }

const char* hyper_isa(void) { return hyper::kernels().name; }

int hyper_set_isa(const char* name) {
  if (name == nullptr) return HYPER_ERROR_ARGUMENT;
  return hyper::select_kernels(name) ? HYPER_OK : HYPER_ERROR_ISA;
}

int hyper_shift_encode_observable(const float* tiles, int64_t n, int bits, int survivor_bits,
                                  const uint16_t* byte_sums, int threads, uint32_t* codes) {
  if (n < 0 || bits < 1 || bits > 8 || survivor_bits < 8 || survivor_bits > 16 || threads < 1) {
    return HYPER_ERROR_ARGUMENT;
  }
  if (n == 0) return HYPER_OK;
  if (tiles == nullptr || codes == nullptr || byte_sums == nullptr || !in_range(byte_sums)) {
    return HYPER_ERROR_ARGUMENT;
  }
  if (!all_finite(tiles, n * hyper::kTileWeights)) return HYPER_ERROR_NON_FINITE;
  return guarded([&] { hyper::encode_tiles(tiles, n, bits, survivor_bits, byte_sums, threads, codes); });
}

int hyper_shift_encode(const float* tiles, int64_t n, int bits, int survivor_bits, uint32_t multiplier, int threads,
                       uint32_t* codes) {
  if (multiplier % 2 == 0) return HYPER_ERROR_ARGUMENT;
  uint16_t byte_sums[hyper::kStates];
  hyper::fill_byte_sums(multiplier, byte_sums);
  return hyper_shift_encode_observable(tiles, n, bits, survivor_bits, byte_sums, threads, codes);
}

int hyper_shift_decode(const uint32_t* codes, int64_t n, int bits, uint32_t multiplier, int threads, float* tiles) {
  if (n < 0 || bits < 1 || bits > 8 || multiplier % 2 == 0 || threads < 1) return HYPER_ERROR_ARGUMENT;
  if (n == 0) return HYPER_OK;
  if (tiles == nullptr || codes == nullptr) return HYPER_ERROR_ARGUMENT;
  return guarded([&] { hyper::decode_tiles(codes, n, bits, multiplier, threads, tiles); });
}

// Decoder of `shift`, format 1: one 16-bit window of the circular bit string per weight.
#include "shift_decode.h"

#include "shift_observable.h"
#include "thread_pool.h"

namespace hyper {
namespace {

// The state is the 16 string positions that end with symbol t; position 0 is the top bit of word 0.
void decode_tile(const uint32_t* words, int bits, uint32_t multiplier, const float* value_of_sum, float* weights) {
  const int count = 8 * bits;
  for (int t = 0; t < kTileWeights; ++t) {
    int first = (t + 1) * bits - kStateBits;
    if (first < 0) first += kTileWeights * bits;
    const int word = first / 32;
    const uint64_t pair = static_cast<uint64_t>(words[word]) << 32 | words[word + 1 < count ? word + 1 : 0];
    const uint32_t state = static_cast<uint32_t>(pair >> (48 - first % 32)) & (kStates - 1);
    weights[t] = value_of_sum[byte_sum(state, multiplier)];
  }
}

}  // namespace

void decode_tiles(const uint32_t* codes, int64_t n, int bits, uint32_t multiplier, int threads, float* tiles) {
  uint16_t byte_sums[kStates];
  fill_byte_sums(multiplier, byte_sums);
  const Moments moments = moments_of(byte_sums);
  float value_of_sum[kMaxByteSum + 1];
  for (int sum = 0; sum <= kMaxByteSum; ++sum) {
    value_of_sum[sum] = static_cast<float>((sum - moments.mean) / moments.deviation);
  }
  WorkCounter work(n, 64);
  run_on_threads(threads, [&] {
    int64_t begin, end;
    while (work.take(&begin, &end)) {
      for (int64_t tile = begin; tile < end; ++tile) {
        decode_tile(codes + tile * 8 * bits, bits, multiplier, value_of_sum, tiles + tile * kTileWeights);
      }
    }
  });
}

}  // namespace hyper

// Windows of `shift` in lanes of 32 bits: what products and decoders share, written once over a class of lanes (meaning:
// simd/words_portable.h; layout: shift_matmul_steps.h) and compiled once per instruction set, with internal linkage.
#pragma once

#include <utility>

#include "shift_matmul_steps.h"
#include "simd/unroll.h"

namespace hyper {
namespace {

// How the tiles of rate K lie in the lanes of W.
template <class W, int K>
struct Lanes {
  static constexpr int kRows = K % 2 + 1;       // of a lane
  static constexpr int kWords = K * kRows / 2;  // of a lane
  static constexpr int kRing = kTile / kRows;   // lanes of a tile
  static constexpr int kVectors = W::kLanes < kRing ? kRing / W::kLanes : 1;  // of a tile
  static constexpr int kTiles = W::kLanes > kRing ? W::kLanes / kRing : 1;    // of a vector
};

// The words of the lanes of vector `part` of a tile, each preceded by the word before them.
template <class W, int K>
struct LaneWords {
  using L = Lanes<W, K>;
  typename W::Vec word[L::kWords + 1];
  typename W::Vec high[L::kWords + 1];  // upper half of the word

  HYPER_INLINE LaneWords(const uint32_t* tile, int64_t next, int part) {
    const int first = part * W::kLanes * L::kWords;
    if constexpr (L::kTiles == 2) {
      W::template deinterleave<L::kWords>(tile, tile + next, word + 1);
    } else {
      W::template deinterleave<L::kWords>(tile + first, word + 1);
    }
    word[0] = W::template previous<L::kRing>(word[L::kWords], tile[(first > 0 ? first : 8 * K) - 1]);
    HYPER_UNROLL
    for (int i = 1; i <= L::kWords; ++i) high[i] = W::high(word[i]);
  }

  // State of weight I of every lane: the 16 bits that end with its last, counted from the lane's first.
  template <int I>
  HYPER_INLINE typename W::Vec state() const {
    constexpr int kLast = (I + 1) * K - 1, kWord = kLast / 32 + 1, kBelow = 31 - kLast % 32;
    if constexpr (kBelow < 16) {
      return W::template within<kBelow, K>(word[kWord]);
    } else if constexpr (kBelow == 16) {
      return high[kWord];
    } else {
      return W::template across<kBelow - 16, K>(word[kWord - 1], high[kWord]);
    }
  }
};

// Asks for the codes of a tile, and of the one beside it where vectors hold two: hardware prefetchers stop at the end of a
// page.
template <class W, int K>
HYPER_INLINE void prefetch_tile(const uint32_t* tile, int64_t next) {
  HYPER_UNROLL
  for (int i = 0; i < 8 * K; i += 16) {
    __builtin_prefetch(tile + i, 0, 3);
    if constexpr (Lanes<W, K>::kTiles == 2) __builtin_prefetch(tile + next + i, 0, 3);
  }
}

// Asks for what follows a tile in kCodesAhead words.
template <class W, int K>
HYPER_INLINE void prefetch_ahead(const uint32_t* tile, int64_t next) {
  prefetch_tile<W, K>(tile + kCodesAhead, next);
}

}  // namespace
}  // namespace hyper

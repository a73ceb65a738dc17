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
  static constexpr bool kHalves = K <= W::kHalvesUpTo;   // whether rows are read by halves of words
  static constexpr int kRows = kHalves ? 1 : K % 2 + 1;  // of a lane
  static constexpr int kWords = K * kRows / 2;           // of a lane, where they are read by words
  static constexpr int kRing = kTile / kRows;            // lanes of a tile
  static constexpr int kVectors = W::kLanes < kRing ? kRing / W::kLanes : 1;  // of a tile
};

// What the windows of vector `part` of a tile are cut from: the words of every lane and the word before them,
template <class W, int K, bool = Lanes<W, K>::kHalves>
struct LaneWords {
  using L = Lanes<W, K>;
  typename W::Vec word[L::kWords + 1];
  typename W::Vec high[L::kWords + 1];  // upper half of the word

  HYPER_INLINE LaneWords(const uint32_t* tile, int part) {
    const int first = part * W::kLanes * L::kWords;
    W::template deinterleave<L::kWords>(tile + first, word + 1);
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

// or all pairs of halves that follow each other in a row: one of them holds every window whole.
template <class W, int K>
struct LaneWords<W, K, true> {
  static_assert(W::kLanes == kTile, "one row in every lane");
  typename W::Vec halves[K];  // halves i - 1 and i of the row

  HYPER_INLINE LaneWords(const uint32_t* tile, int) { W::template adjacent_halves<K>(tile, halves); }

  template <int I>
  HYPER_INLINE typename W::Vec state() const {
    constexpr int kLast = (I + 1) * K - 1;
    return W::template within<15 - kLast % 16, K>(halves[kLast / 16]);
  }
};

// Asks for what follows a tile in kCodesAhead words: hardware prefetchers stop at the end of a page.
template <int K>
HYPER_INLINE void prefetch_ahead(const uint32_t* tile) {
  HYPER_UNROLL
  for (int i = 0; i < 8 * K; i += 16) __builtin_prefetch(tile + kCodesAhead + i, 0, 3);
}

}  // namespace
}  // namespace hyper

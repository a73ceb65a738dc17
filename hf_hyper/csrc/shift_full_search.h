// Full tail-biting search, L' = 16; defined at the top of shift_encode.cpp.
#pragma once

#include <memory>

#include "isa.h"
#include "shift_code.h"

namespace hyper {
namespace {

// Full search over one or two tiles at a time. The trace back reads the choices of every step, or where the costs of
// every step are kept it repeats the 2^k sums of each class on the path.
class FullSearch {
 public:
  FullSearch(const Code& code, int tiles)
      : code_(code), tiles_(tiles), steps_(kernels().shift), keeps_choices_(code.bits <= kMaxChoiceBits),
        rows_(keeps_choices_ ? 2 : kTileWeights + 1), choice_bytes_(code.classes / 8 * ((1 << code.bits) - 1)),
        costs_(new uint16_t[static_cast<size_t>(tiles) * rows_ * code.classes]),
        choices_(keeps_choices_ ? new uint8_t[static_cast<size_t>(tiles) * kTileWeights * choice_bytes_] : nullptr) {}

  // targets [tiles][256] -> symbols [tiles][256]
  void encode(const int16_t (*targets)[kTileWeights], uint8_t (*symbols)[kTileWeights]) {
    const int n = 8 * span(code_.bits);
    int seam[2];
    for (int i = 0; i < tiles_; ++i) std::fill_n(costs(i, 0), code_.classes, uint16_t{0});
    for (int t = 0; t < 2 * n; ++t) step(targets, (t - n) & (kTileWeights - 1), t);
    for (int i = 0; i < tiles_; ++i) {
      seam[i] = cheapest(costs(i, 2 * n), code_.classes);
      for (int t = 2 * n - 1; t >= n; --t) seam[i] = before(i, t, seam[i], targets[i][t - n]);
    }
    for (int i = 0; i < tiles_; ++i) {
      std::fill_n(costs(i, 0), code_.classes, kNever);
      costs(i, 0)[seam[i]] = 0;
    }
    for (int t = 0; t < kTileWeights; ++t) step(targets, t, t);
    for (int i = 0; i < tiles_; ++i) {
      int c = seam[i];
      for (int t = kTileWeights - 1; t >= 0; --t) {
        symbols[i][t] = static_cast<uint8_t>(c & ((1 << code_.bits) - 1));
        c = before(i, t, c, targets[i][t]);
      }
    }
  }

 private:
  uint16_t* costs(int tile, int t) {
    return costs_.get() + (static_cast<size_t>(tile) * rows_ + t % rows_) * code_.classes;
  }
  uint8_t* choices(int tile, int t) {
    return choices_.get() + (static_cast<size_t>(tile) * kTileWeights + t) * choice_bytes_;
  }

  void step(const int16_t (*targets)[kTileWeights], int weight, int t) {
    const uint16_t* old[2];
    uint16_t* next[2];
    uint8_t* chosen[2];
    int16_t target[2];
    uint16_t lowest[2];
    for (int i = 0; i < tiles_; ++i) {
      old[i] = costs(i, t);
      next[i] = costs(i, t + 1);
      chosen[i] = keeps_choices_ ? choices(i, t) : nullptr;
      target[i] = targets[i][weight];
    }
    const FullStep* steps = tiles_ == 1 ? steps_.full_one : steps_.full_two;
    steps[code_.bits - 1](old, next, code_.blocked.data(), target, chosen, lowest);
    for (int i = 0; i < tiles_; ++i) {
      if (lowest[i] >= kRescaleAt) steps_.subtract(next[i], code_.classes, lowest[i]);
    }
  }

  // Class before step t on the best path into class c after it.
  int before(int tile, int t, int c, int target) {
    const int h = keeps_choices_ ? kept_choice(choices(tile, t), c) : repeated_choice(costs(tile, t), c, target);
    return (h * code_.classes + c) >> code_.bits;
  }

  int kept_choice(const uint8_t* choices, int c) const {
    const int others = (1 << code_.bits) - 1;
    const uint8_t* entries = choices + c / kBlock * others * 4 + c % kBlock / 8;
    int h = others;
    while (h > 0 && (entries[(h - 1) * 4] >> c % 8 & 1) == 0) --h;
    return h;
  }

  int repeated_choice(const uint16_t* costs, int c, int target) const {
    uint32_t best = ~0u;
    int choice = 0;
    for (int h = 0; h < 1 << code_.bits; ++h) {
      const int state = h * code_.classes + c;
      const uint32_t total = std::min<uint32_t>(costs[state >> code_.bits] + code_.branch(state, target), kNever);
      if (total < best) {
        best = total;
        choice = h;
      }
    }
    return choice;
  }

  const Code& code_;
  const int tiles_;
  const ShiftSteps& steps_;
  const bool keeps_choices_;
  const int rows_;             // steps whose costs are kept
  const size_t choice_bytes_;  // a step and tile
  std::unique_ptr<uint16_t[]> costs_;
  std::unique_ptr<uint8_t[]> choices_;
};

}  // namespace
}  // namespace hyper

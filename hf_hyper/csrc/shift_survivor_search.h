// Tail-biting search with one survivor per class of the last bits, L' < 16; defined at the top of shift_encode.cpp.
#pragma once

#include <memory>

#include "isa.h"
#include "shift_code.h"

namespace hyper {
namespace {

constexpr int kWidest = 32;  // most lanes of a vector class; fewer windows than lanes go through the narrow scalar one
constexpr int kWidenSteps = 4;  // steps between two doublings of the windows kept, at the end of pass 2

// Survivor search. The windows of every step are kept; a window names its own predecessor.
class SurvivorSearch {
 public:
  explicit SurvivorSearch(const Code& code)
      : code_(code), steps_((1 << code.class_bits < kWidest ? kScalarKernels : kernels()).shift), forced_((kStateBits - code.bits) / code.bits),
        costs_(new uint16_t[2 * code.classes]) {
    size_t total = 0;
    for (int t = 0; t <= kTileWeights; ++t) {
      const int free_steps = kTileWeights - forced_ - t;
      width_[t] = std::max(code.class_bits, kStateBits - code.bits - std::max(free_steps, 0) / kWidenSteps);
      start_[t] = total;
      total += size_t{1} << width_[t];
    }
    windows_.reset(new uint16_t[total]);
  }

  // targets [256] -> symbols [256]
  void encode(const int16_t* targets, uint8_t* symbols) {
    const int n = 4 * span(code_.bits);
    const int classes = 1 << code_.class_bits;
    for (int c = 0; c < classes; ++c) windows(0)[c] = static_cast<uint16_t>(c);
    std::fill_n(costs(0), classes, uint16_t{0});
    for (int t = 0; t < 2 * n; ++t) step(t, targets[(t - n) & (kTileWeights - 1)]);
    int c = cheapest(costs(2 * n), classes);
    for (int t = 2 * n; t > n; --t) c = before(t, c);
    const int seam = windows(n)[c] & (code_.classes - 1);

    std::fill_n(costs(0), classes, kNever);
    costs(0)[seam & (classes - 1)] = 0;
    windows(0)[seam & (classes - 1)] = static_cast<uint16_t>(seam);
    const int end = kTileWeights - forced_;
    for (int t = 0; t < end; ++t) step(t, targets[t]);
    const int symbol_mask = (1 << code_.bits) - 1;
    for (int t = end; t < kTileWeights; ++t) symbols[t] = forced_symbol(seam, t);
    c = close_ring(targets, seam);
    for (int t = end; t > 0; --t) {
      symbols[t - 1] = static_cast<uint8_t>(c & symbol_mask);
      c = before(t, c);
    }
  }

 private:
  // After t steps: windows and costs by class.
  uint16_t* windows(int t) { return windows_.get() + start_[t]; }
  uint16_t* costs(int t) { return costs_.get() + (t & 1) * code_.classes; }

  void step(int t, int16_t target) {
    const int origins = 1 << (code_.bits + width_[t] - width_[t + 1]);
    const uint16_t lowest =
        steps_.survivor[code_.bits - 1](costs(t), windows(t), costs(t + 1), windows(t + 1), width_[t + 1], origins,
                                        code_.table.data(), target);
    if (lowest >= kRescaleAt) steps_.subtract(costs(t + 1), 1 << width_[t + 1], lowest);
  }

  int before(int t, int c) { return windows(t)[c] >> code_.bits & ((1 << width_[t - 1]) - 1); }

  uint8_t forced_symbol(int seam, int t) const {
    return static_cast<uint8_t>(seam >> code_.bits * (kTileWeights - 1 - t) & ((1 << code_.bits) - 1));
  }

  // Class at the end of the free steps whose window runs into the seam at the least cost.
  int close_ring(const int16_t* targets, int seam) {
    const int end = kTileWeights - forced_;
    const int stride = 1 << (kStateBits - code_.bits - forced_ * code_.bits);
    uint32_t best = ~0u;
    int chosen = 0;
    for (int c = seam >> forced_ * code_.bits; c < code_.classes; c += stride) {
      uint32_t total = costs(end)[c];
      int window = windows(end)[c];
      for (int t = end; t < kTileWeights && total < best; ++t) {
        window = (window << code_.bits | forced_symbol(seam, t)) & (kStates - 1);
        total += code_.branch(window, targets[t]);
      }
      if (total < best) {
        best = total;
        chosen = c;
      }
    }
    return chosen;
  }

  const Code& code_;
  const ShiftSteps& steps_;
  const int forced_;                      // q
  int width_[kTileWeights + 1];           // class bits after t steps
  size_t start_[kTileWeights + 1];        // first window after t steps
  std::unique_ptr<uint16_t[]> costs_, windows_;
};

}  // namespace
}  // namespace hyper

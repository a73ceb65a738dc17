// Bodies of the search steps, written once over a small vector class and compiled once per instruction set.
//
// A vector class V has kLanes 16-bit lanes and the operations of simd/portable.h, which is the reference for their
// meaning. Everything here has internal linkage: two units compiled with different flags must not share a function.
#pragma once

#include "shift_steps.h"

namespace hyper {
namespace {

// Squared distance between table entries and the target, as costs.
template <class V, int kBits>
inline typename V::Vec branch(typename V::Vec entry, typename V::Vec target) {
  if constexpr (kBits <= 4) {
    const auto d = V::sub_sat(entry, target);
    return V::mul_round_high(d, d);
  } else {
    const auto d = V::min(V::abs(V::sub(entry, target)), V::set1(255));
    return V::mul_low(d, d);
  }
}

template <class V, int kBits, int kTiles>
void full_step(const uint16_t* const* old, uint16_t* const* next, const int16_t* table, const int16_t* targets,
               [[maybe_unused]] uint8_t* const* choices, uint16_t* lowest) {
  using Vec = typename V::Vec;
  constexpr int kClasses = 1 << (16 - kBits);
  constexpr int kChoices = 1 << kBits;
  constexpr int kStride = kClasses >> kBits;  // predecessors h * kStride + (c >> kBits), h = 0..kChoices-1
  Vec target[kTiles], floor[kTiles];
  for (int i = 0; i < kTiles; ++i) {
    target[i] = V::set1(targets[i]);
    floor[i] = V::set1(-1);
  }
  for (int block = 0; block < kClasses; block += kBlock) {
    for (int c = block; c < block + kBlock; c += V::kLanes) {
      const int16_t* entries = table + block * kChoices + (c - block);
      Vec best[kTiles];
      for (int i = 0; i < kTiles; ++i) best[i] = V::set1(-1);
      for (int h = 0; h < kChoices; ++h) {
        const Vec entry = V::load(entries + h * kBlock);
        for (int i = 0; i < kTiles; ++i) {
          const Vec before = V::template expand<kBits>(old[i] + h * kStride + (c >> kBits));
          const Vec total = V::add_sat(before, branch<V, kBits>(entry, target[i]));
          if constexpr (kBits <= kMaxChoiceBits) {
            uint8_t* chosen = choices[i] + (block / kBlock * (kChoices - 1) + h - 1) * 4 + (c - block) / 8;
            if (h > 0) V::store_less(chosen, total, best[i]);
          }
          best[i] = V::min(best[i], total);
        }
      }
      for (int i = 0; i < kTiles; ++i) {
        V::store(next[i] + c, best[i]);
        floor[i] = V::min(floor[i], best[i]);
      }
    }
  }
  for (int i = 0; i < kTiles; ++i) lowest[i] = V::reduce_min(floor[i]);
}

template <class V, int kBits>
uint16_t survivor_step(const uint16_t* cost, const uint16_t* window, uint16_t* next_cost, uint16_t* next_window,
                       int class_bits, int origins, const int16_t* table, int16_t target_entry) {
  using Vec = typename V::Vec;
  constexpr int kChoices = 1 << kBits;
  const int classes = 1 << class_bits;
  const int stride = classes >> kBits;
  const Vec target = V::set1(target_entry);
  Vec floor = V::set1(-1);
  for (int c = 0; c < classes; c += V::kLanes) {
    Vec best = V::set1(-1);
    Vec origin = V::template expand<kBits>(window + (c >> kBits));
    for (int h = 0; h < origins; ++h) {
      const int before = h * stride + (c >> kBits);
      const Vec entry = V::template follow<kBits>(table + (c & (kChoices - 1)), window + before);
      const Vec total =
          V::add_sat(V::template expand<kBits>(cost + before), branch<V, kBits>(entry, target));
      origin = V::select_less(total, best, V::template expand<kBits>(window + before), origin);
      best = V::min(best, total);
    }
    V::store(next_cost + c, best);
    const Vec symbol = V::bit_and(V::add(V::iota(), V::set1(static_cast<int16_t>(c))), V::set1(kChoices - 1));
    V::store(next_window + c, V::bit_or(V::template shift_left<kBits>(origin), symbol));
    floor = V::min(floor, best);
  }
  return V::reduce_min(floor);
}

inline void subtract(uint16_t* costs, int count, uint16_t amount) {
  for (int i = 0; i < count; ++i) costs[i] = static_cast<uint16_t>(costs[i] - amount);
}

// F serves the full search, S the survivor search; the best width differs between them.
template <class F, class S>
constexpr ShiftSteps shift_steps() {
  return {{full_step<F, 1, 1>, full_step<F, 2, 1>, full_step<F, 3, 1>, full_step<F, 4, 1>, full_step<F, 5, 1>,
           full_step<F, 6, 1>, full_step<F, 7, 1>, full_step<F, 8, 1>},
          {full_step<F, 1, 2>, full_step<F, 2, 2>, full_step<F, 3, 2>, full_step<F, 4, 2>, full_step<F, 5, 2>,
           full_step<F, 6, 2>, full_step<F, 7, 2>, full_step<F, 8, 2>},
          {survivor_step<S, 1>, survivor_step<S, 2>, survivor_step<S, 3>, survivor_step<S, 4>, survivor_step<S, 5>,
           survivor_step<S, 6>, survivor_step<S, 7>, survivor_step<S, 8>},
          subtract};
}

}  // namespace
}  // namespace hyper

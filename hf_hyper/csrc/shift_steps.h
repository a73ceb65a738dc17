// One step of the two searches behind `shift_encode.cpp`: all survivors advance by one weight.
//
// Shared units: a table entry and a target are int16 in steps of 1 / scale(bits) byte sums, a cost is a saturating
// uint16. The exact arithmetic is defined at the top of shift_encode.cpp.
#pragma once

#include <cstdint>

namespace hyper {

// States are evaluated in blocks: kBlock consecutive classes for h = 0, the same classes for h = 1, and so on. In this
// order the search reads its 128 KiB table once, front to back, for every weight.
constexpr int kBlock = 32;

// Up to this rate 2^bits - 1 bits a class are kept for the trace back, above it the 16-bit cost itself: whichever is
// less to write. At 1 and 2 bits rows of costs would spill into memory and run at a third to half of the speed.
constexpr int kMaxChoiceBits = 3;

// Full search over tiles that advance together, so that a table entry is fetched once for all of them.
//   old, next  [tiles][2^(16-bits)] costs by class
//   table      [2^16] entries in block order
//   targets    [tiles]
//   choices    [tiles][2^(16-bits) / 32][2^bits - 1][4 bytes], where bits <= kMaxChoiceBits: bit i of entry h - 1 of a
//              block is set if predecessor h of its class i beats all before it, so the last one set is the choice
//   lowest     [tiles], smallest entry of each next
using FullStep = void (*)(const uint16_t* const* old, uint16_t* const* next, const int16_t* table,
                          const int16_t* targets, uint8_t* const* choices, uint16_t* lowest);

// Survivor search: class = low bits of the window, one whole 16-bit window kept per class. Each of the 2^class_bits
// classes after the step chooses among `origins` classes before it, of which there are origins * 2^(class_bits - bits).
//   cost, window            before the step
//   next_cost, next_window  [2^class_bits] after it
//   table                   [2^16] entries in the order of the states
// Returns the smallest next_cost.
using SurvivorStep = uint16_t (*)(const uint16_t* cost, const uint16_t* window, uint16_t* next_cost,
                                  uint16_t* next_window, int class_bits, int origins, const int16_t* table,
                                  int16_t target);

// costs[i] -= amount, for [count] costs of at least `amount`.
using Subtract = void (*)(uint16_t* costs, int count, uint16_t amount);

struct ShiftSteps {
  FullStep full_one[8];  // [bits - 1]
  FullStep full_two[8];
  SurvivorStep survivor[8];
  Subtract subtract;
};

}  // namespace hyper

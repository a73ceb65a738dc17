// What products and decoding of `winding` need from an instruction set.
//
// GROUPS. A kernel works on 16 pairs at once, one pair per lane: 16 codes of w bits are w / 2 words, so a group begins
// at the top of a word or, if w is odd, in the middle of one.
//
// ACTIVATIONS for `tokens` tokens: [groups, tokens, 2, 16] float, first weights of the pairs and then second ones, zeros
// beyond the row. `tokens` is one of kTokenForms.
//
// Decoded weights are the same floats on every machine: storage/FORMAT.md, each operation rounded by itself. Only sums
// over a row depend on the instruction set.
#pragma once

#include <cstdint>

namespace hyper {

constexpr int kPairs = 16;          // of a group
constexpr int kWindowWords = 16;    // read from the first word of a group on
constexpr int kNearShells = 16;     // shell sides kept in a register

// Constants of one weight, prepared once per call.
struct WindingConstants {
  int32_t width;            // bits of a code, 1..22
  int32_t stride;           // codes of a shell
  int32_t shells;           // beside the box
  uint32_t direction[2];
  float inverse;            // 1 / stride
  float centre[2];
  const float* sides;       // [shells + 1]
  float near_sides[kNearShells];
  // Where the codes of a group lie, by the group's first bit: at the top of a word or in its middle.
  int32_t word[2][kPairs];
  uint32_t bit[2][kPairs];
};

struct WindingSteps {
  // Products of one row with the activations of kTokenForms[form] tokens: words [groups] of which `available` may be
  // read -> sums [tokens].
  void (*multiply[4])(const WindingConstants& constants, const uint32_t* words, int64_t available, int64_t groups,
                      const float* activations, float* sums);
  // One row -> weights [groups * 32].
  void (*decode)(const WindingConstants& constants, const uint32_t* words, int64_t available, int64_t groups,
                 float* weights);
  // x [columns] of a HYPER_* dtype -> activations of token `token` of `tokens`, whose padding is zero already.
  void (*arrange)(const void* x, int dtype, int64_t columns, int token, int tokens, float* activations);
  // values [count] -> to[offset...] of a HYPER_* dtype
  void (*store)(const float* values, int64_t count, int dtype, void* to, int64_t offset);
};

// The steps for the instruction set in use, or the next best that this machine runs.
const WindingSteps& winding_steps();

}  // namespace hyper

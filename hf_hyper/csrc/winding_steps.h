// What products and decoding of `winding` need from an instruction set.
//
// GROUPS. A kernel works on 16 pairs at once, one pair per lane: 16 codes of w bits are w / 2 words, so a group begins
// at the top of a word or, if w is odd, in the middle of one.
//
// PRODUCTS. A pair of weights in a shell of side S is centre + S (theta - 1/2), so that
//
//     w0 x0 + w1 x1 = S (theta0 x0 + theta1 x1 - (x0 + x1) / 2) + centre0 x0 + centre1 x1
//
// The kernels sum the first part; the second is the same for every row. ACTIVATIONS for `tokens` tokens, one of
// kTokenForms, are [groups, tokens, streams, 16] float: x0 and x1 in units of 2^32, because theta comes in units of 2^-32,
// and for few tokens -(x0 + x1) / 2, which saves the subtraction from theta; zeros beyond the row.
//
// Decoded weights are the same floats on every machine: storage/FORMAT.md, each operation rounded by itself. Only sums
// over a row depend on the instruction set.
#pragma once

#include <cstdint>

namespace hyper {

constexpr int kMaxWindingWidth = 22;  // bits of a code
constexpr int kPairs = 16;        // of a group
constexpr int kWindowWords = 16;  // read from the first word of a group on
constexpr int kNearShells = 16;   // entries of tables that fit a register
constexpr uint32_t kFloatOne = 0x4B000000;  // of 2^23 as a float; code more is the float 2^23 + code

static constexpr int activation_streams(int tokens) { return tokens <= 2 ? 3 : 2; }

// Constants of one weight, prepared once per call.
struct WindingConstants {
  int32_t width;   // bits of a code, 1..22
  uint32_t mask;   // as many ones
  int32_t stride;  // codes of a shell
  int32_t shells;  // beside the box
  uint32_t direction[2];
  float inverse;  // 1 / stride
  float centre[2];
  const float* sides;  // [shells + 1]
  // By code div stride, where that is always less than kNearShells: side, and code of the first point plus
  // kFloatOne.
  bool near;
  float near_sides[kNearShells];
  uint32_t near_starts[kNearShells];
  // Where the codes of a group lie, by the group's first bit, at the top of a word or in its middle: the word and the bit
  // that a code begins with; and the four bytes that hold it, lowest first, with the bits below it there.
  int32_t word[2][kPairs];
  uint32_t bit[2][kPairs];
  uint8_t bytes[2][4 * kPairs];
  uint32_t shift[2][kPairs];
};

struct WindingRow {
  // First parts of the products of one row with the activations of kTokenForms[form] tokens: words [groups] of
  // which `available` may be read -> sums [tokens].
  void (*multiply[4])(const WindingConstants& constants, const uint32_t* words, int64_t available, int64_t groups,
                      const float* activations, float* sums);
  // One row -> weights [groups * 32].
  void (*decode)(const WindingConstants& constants, const uint32_t* words, int64_t available, int64_t groups,
                 float* weights);
};

struct WindingSteps {
  WindingRow row[2];  // by WindingConstants::near
  // x [columns] of a HYPER_* dtype -> activations of token `token` of `tokens`, whose padding is zero already, and the sums
  // [2] of those that meet first and second weights of the pairs
  void (*arrange)(const void* x, int dtype, int64_t columns, int token, int tokens, float* activations, float* sums);
  // values [count] -> to[offset...] of a HYPER_* dtype
  void (*store)(const float* values, int64_t count, int dtype, void* to, int64_t offset);
};

// The steps for the instruction set in use, or the next best that this machine runs.
const WindingSteps& winding_steps();

}  // namespace hyper

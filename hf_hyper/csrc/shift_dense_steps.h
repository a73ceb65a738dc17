// What the product for many tokens needs from an instruction set with dot products of bfloat16 pairs.
//
// STEPS. The columns of a row are cut into vectors of 32 bfloat16, in an order of no meaning that weights and activations
// share: a group of 16 tiles gives 8 vectors, vector p holding columns 2p and 2p + 1 of each of its tiles; the tiles left
// over are packed without gaps. Sums over a vector's lanes are taken once, at the end.
//
//     weights      [4 blocks of rows, steps, 4 rows, 32]     one output tile, centred byte sums
//     activations  [steps, tokens, 32]                       one block of up to kDenseTokens tokens
#pragma once

#include <cstdint>

#include "shift_matmul_steps.h"

namespace hyper {

constexpr int kDenseTokens = 6;  // 4 rows times 6 tokens are 24 sums, which leaves registers for the operands
constexpr int kDenseRows = 4;
constexpr int kGroupSteps = 8;
constexpr int kStepValues = 32;

struct DenseSteps {
  // Codes of `groups` groups -> weights from step `first` of `steps`.
  void (*decode[8])(const uint32_t* codes, int64_t groups, uint32_t multiplier, int64_t first, int64_t steps,
                    uint16_t* weights);
  // values [groups * 16, 16] float -> activations of token `token` of `tokens`
  void (*arrange)(const float* values, int64_t groups, int token, int tokens, uint16_t* activations);
  // sums [4 rows, tokens, 16] = or, unless `fresh`, += products over `steps` steps; entry t is for t + 1 tokens
  void (*multiply[kDenseTokens])(const uint16_t* weights, const uint16_t* activations, int64_t steps, bool fresh,
                                 float* sums);
  // sums [4 blocks, 4 rows, tokens, 16] of token `token` -> (totals - offset) * units, [16 rows]
  void (*finish)(const float* sums, int token, int tokens, float offset, const float* units, float* rows);
};

// Null where this machine, this build or the instruction set in use has no such steps.
const DenseSteps* dense_steps();

// Most tokens for which they are the fastest way; 0 if there are none.
int64_t dense_tokens();

}  // namespace hyper

// What the product of activations with `shift` weights needs from an instruction set.
//
// LANES. A kernel works on a group of `lanes` tiles at once, one tile per 32-bit lane, so that the shifts that cut out
// a window are the same in all lanes and known at compile time. A group is `lanes` consecutive tiles of memory.
//
// ACTIVATIONS of a group, for `tokens` tokens: blocks of 32-bit words
//   values  [tokens, 16, lanes]   column c of the tile in each lane: float, or an integer as `dot` of the lanes wants it
//   and for int8 also
//   scale   [tokens, lanes]       float: what one unit of the integers stands for, per token and tile
//   offset  [tokens, lanes]       int32: -510 times the sum of the integers
#pragma once

#include <cstdint>

#include "hyper.h"

namespace hyper {

constexpr int kTile = 16;
constexpr int kByteCentre = 510;  // half of the largest byte sum
constexpr int kMaxLanes = 16;
constexpr int kMaxTokens = 8;

constexpr int activation_rows(bool int8) { return int8 ? kTile + 2 : kTile; }

// Adds to sums [16, tokens, lanes] the products of `groups` groups: codes [groups * lanes, 8 * bits].
using MultiplyStep = void (*)(const uint32_t* codes, int64_t groups, const uint32_t* activations, uint32_t multiplier,
                              float* sums);

// Writes centred byte sums of `groups` groups, [16, groups * lanes * 16] with rows `stride` values apart.
using DecodeStep = void (*)(const uint32_t* codes, int64_t groups, uint32_t multiplier, void* rows, int64_t stride);

struct MatmulSteps {
  const char* name;
  int lanes;
  // Token counts with kernels, by index; a count between two of them uses the larger.
  MultiplyStep exact[8][4], int8[8][4];
  DecodeStep decode_float[8], decode_bfloat16[8];
  // values [lanes-wide groups * lanes, 16] float -> activations of token `token` of `tokens`
  void (*arrange)(const float* values, int64_t groups, bool int8, int token, int tokens, uint32_t* activations);
  // sums [16, tokens, lanes] -> totals [16, tokens, segments] over `width` lanes each
  void (*reduce)(const float* sums, int rows, int segments, int width, float* totals);
  // x [in_features] of HYPER_* dtype -> R_in S_in x, [padded_in] float
  void (*rotate_input)(const hyper_shift_plan& plan, const void* x, int dtype, float* rotated);
  // y [output_block] of block `block`, in the rotated basis and overwritten -> its part of out [out_features]
  void (*rotate_output)(const hyper_shift_plan& plan, int64_t block, const uint16_t* out_scale, float* y, int dtype,
                        void* out);
  // product [rows] of a HYPER_* dtype -> (product - offset) * units, [rows] float
  void (*scale_product)(const void* product, int dtype, int64_t rows, const float* units, float offset, float* values);
  void (*to_bfloat16)(const float* from, int64_t count, uint16_t* to);
};

constexpr int kTokenForms[4] = {1, 2, 4, 8};

// Index of the smallest form that holds `tokens`, 1..8.
inline int token_form(int tokens) {
  int form = 0;
  while (kTokenForms[form] < tokens) ++form;
  return form;
}

// The steps for the instruction set in use, or the next best that this machine runs.
const MatmulSteps& matmul_steps();

}  // namespace hyper

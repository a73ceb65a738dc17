// What the product of activations with `shift` weights needs from an instruction set.
//
// LANES. A 32-bit lane holds the words of one row of a tile or, at odd rates, whose rows end in the middle of a word, of
// two: the shifts that cut out a window are then the same in all lanes and known at compile time, one activation meets
// all lanes, and codes are read in the order of memory. A tile fills one vector or several. Vectors of 16 lanes that can
// sort 16-bit halves at will read rows by halves at most rates, one row in every lane at odd ones too.
//
// ACTIVATIONS for `tokens` tokens: for every input tile and token a record of 32-bit words
//   [16]  columns of the tile: float, or an integer of 8 bits as `dot` of the lanes wants it; or
//   [8]   pairs of columns, integers of 16 bits, the first one in the lower half
//   and for integers also
//   [1]   float: what one unit of the integers stands for
//   [1]   int32: -510 times the sum of the integers
#pragma once

#include <cstdint>

#include "hyper.h"

namespace hyper {

constexpr int kTile = 16;
constexpr int kByteCentre = 510;  // half of the largest byte sum
constexpr int kMaxTokens = 8;
constexpr int kMaxOutputBlock = 128;
constexpr int kCodesAhead = 1024;  // words between the codes that are asked for and those that are read, about

// How activations are held after the rotation.
enum Activations { kFloat, kInt16, kInt8 };

constexpr int record_words(Activations kind) {
  return kind == kFloat ? kTile : kind == kInt16 ? kTile / 2 + 2 : kTile + 2;
}

// Products of an output tile of `in_tiles` tiles, codes [in_tiles, 8 * bits] -> totals [tokens, 16].
using MultiplyStep = void (*)(const uint32_t* codes, int64_t in_tiles, const uint32_t* activations,
                              uint32_t multiplier, float* totals);

// Centred byte sums of an output tile -> [16, in_tiles * 16] with rows `stride` values apart.
using DecodeStep = void (*)(const uint32_t* codes, int64_t in_tiles, uint32_t multiplier, void* rows, int64_t stride);

struct MatmulSteps {
  const char* name;
  bool int16;  // whether there are products of kInt16
  // By Activations, bits and token form (kTokenForms); of kInt8 for one token only.
  MultiplyStep multiply[3][8][4];
  DecodeStep decode_float[8], decode_bfloat16[8];
  // values [in_tiles, 16] float -> activations of token `token` of `tokens`
  void (*arrange)(const float* values, int64_t in_tiles, Activations kind, int token, int tokens,
                  uint32_t* activations);
  // x [in_features] of HYPER_* dtype -> R_in S_in x, [padded_in] float, and its sum
  float (*rotate_input)(const hyper_shift_plan& plan, const void* x, int dtype, float* rotated);
  // y [tokens, output_block] of block `block` in the rotated basis, tokens `stride` values apart -> its columns of
  // out [tokens, out_features]
  void (*rotate_output)(const hyper_shift_plan& plan, int64_t block, const uint16_t* out_scale, const float* y,
                        int64_t tokens, int64_t stride, int dtype, void* out);
  // sums [output_block, columns] of the rows of a block from `first` on, overwritten -> (sums - mean_offset) * units
  // [output_block], and S_out R_out^T of that: to, rows `stride` values apart; columns a multiple of 16
  void (*rotate_columns)(const hyper_shift_plan& plan, int64_t first, const float* units, float* sums, int64_t columns,
                         float* to, int64_t stride);
  // rotated [padded_in], overwritten -> scale * S_in R_in^T rotated, limited to finite numbers: to[first...] of a HYPER_*
  // dtype, [in_features]
  void (*unrotate_input)(const hyper_shift_plan& plan, float* rotated, float scale, int dtype, void* to, int64_t first);
  // product [rows] of a HYPER_* dtype -> (product - offset) * units, [rows] float
  void (*scale_product)(const void* product, int dtype, int64_t rows, const float* units, float offset, float* values);
  void (*to_bfloat16)(const float* from, int64_t count, uint16_t* to);
};

// Token counts with kernels; a count between two of them uses the larger.
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

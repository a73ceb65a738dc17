// What products for many tokens need from an instruction set with dot products of bfloat16 pairs and of four bytes.
//
// PANELS. Weights are decoded panel by panel, 32 rows and some hundred columns, into the nearest caches; all tokens are
// multiplied with a panel, in blocks of up to kDenseTokens, before the next one is decoded. A step is as many columns as
// fill 32 bits, two of bfloat16 or four bytes:
//
//     weights      [steps, 2 vectors, 16 lanes, columns of a step]   row 16 v + l of the panel in lane l of vector v
//     activations  [tokens of the block, columns of the widest panel]   a narrower one leaves the last ones unused
//     sums         [tokens of the block, 2 vectors, 16 lanes] float
//
// BYTES. Activations are signed, with a scale for every token and panel; weights are unsigned quarters of byte sums, of
// which products take off kQuarterCentre.
#pragma once

#include <cstdint>

#include "shift_matmul_steps.h"
#include "winding_steps.h"

namespace hyper {

constexpr int kDenseTokens = 12;  // times 2 vectors are 24 sums, which leaves registers for the operands
constexpr int kPanelRows = 32;
constexpr int kStripeRows = kMaxOutputBlock;  // that meet activations while these are near: whole output blocks
constexpr int kPairTiles = 36;  // of the widest panel: sums then go through memory once for 576 columns
constexpr int kByteTiles = 16;  // as many columns as share a scale
constexpr int kPairColumns = kPairTiles * kTile;
constexpr int kByteColumns = kByteTiles * kTile;
constexpr int kStepBytes = 4 * kPanelRows;
constexpr int kStepValues = kStepBytes / 2;  // of bfloat16

constexpr int kQuarterCentre = 128;

// Of byte sums in quarters, rounded halves up, for a given mean of the sums.
constexpr float mean_byte_quarter(float mean_sum) { return mean_sum / 4 + 0.125f; }

// Of the activations of a token in a panel.
struct ByteScale {
  float unit;      // what one of the integers stands for
  int32_t centre;  // -kQuarterCentre times the sum of the integers
};

struct DenseSteps {
  // Centred byte sums of `in_tiles` tiles of an output tile and of the one that begins `next` words later, by bits: a
  // vector for the rows of each.
  void (*decode_shift[8])(const uint32_t* codes, int64_t next, int64_t in_tiles, uint32_t multiplier,
                          uint16_t* weights);
  // The same in bytes: (sum + 2) / 4, rounded down.
  void (*decode_shift_bytes[8])(const uint32_t* codes, int64_t next, int64_t in_tiles, uint32_t multiplier,
                                uint8_t* weights);
  // x[first...] of a HYPER_* dtype -> values [count]
  void (*load)(const void* x, int dtype, int64_t first, int64_t count, float* values);
  // x [in_features] of a HYPER_* dtype -> R_in S_in x, [padded_in] float
  void (*rotate)(const hyper_shift_plan& plan, const void* x, int dtype, float* rotated);
  // The same rounded, and its sum before that; overwrites `values` [padded_in]
  float (*rotate_and_round)(const hyper_shift_plan& plan, const void* x, int dtype, float* values, uint16_t* rotated);
  // values [columns] -> activations; columns a multiple of 16
  void (*round)(const float* values, int64_t columns, uint16_t* activations);
  // The same in bytes, and the sum of the rounded values
  double (*round_bytes)(const float* values, int64_t columns, int8_t* activations, ByteScale* scale);
  // sums = or, unless `fresh`, += products over `steps` steps; entry t is for t + 1 tokens
  void (*multiply[kDenseTokens])(const uint16_t* weights, const uint16_t* activations, int64_t steps, bool fresh,
                                 float* sums);
  // The same in bytes; scales [tokens]
  void (*multiply_bytes[kDenseTokens])(const uint8_t* weights, const int8_t* activations, const ByteScale* scales,
                                       int64_t steps, bool fresh, float* sums);
  // Sums of decode_shift's panels [blocks of 32 rows, tokens, 2, 16], of the `count` rows of a stripe from `first` on ->
  // (sums - offset * totals [tokens]) * units [count], rotated back: their columns of out [tokens, out_features]
  void (*finish_shift)(const hyper_shift_plan& plan, int64_t first, int64_t count, const float* sums, int64_t tokens,
                       float offset, const float* totals, const float* units, const uint16_t* out_scale, int dtype,
                       void* out);
  // The first `rows` of sums [tokens, 2, 16] -> y[first...] of a HYPER_* dtype, tokens `stride` values apart
  void (*store)(const float* sums, int64_t tokens, int64_t rows, int dtype, void* y, int64_t first, int64_t stride);
};

// Some pairs of columns of 16 rows of `winding`, `row_words` words each -> a vector of the steps of a panel; pairs beyond
// the rows give weights of no meaning.
using DecodeWinding = void (*)(const WindingConstants& constants, const uint32_t* const rows[16], int64_t row_words,
                               int64_t first_pair, int64_t pairs, uint16_t* weights);

// Null where this machine, this build or the instruction set in use has no such steps.
const DenseSteps* dense_steps();

// Of the same instruction set, by WindingConstants::near.
const DecodeWinding* winding_panels();

// Most tokens for which they are the fastest way; 0 if there are none.
int64_t dense_tokens();

}  // namespace hyper

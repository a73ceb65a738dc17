// How the tiles of one weight are laid over lanes and dealt to threads.
//
// The input tiles of one output tile are contiguous and fill whole groups of lanes; `rest` of them are left over. The
// rests of `segments` output tiles share one ragged group, so that 36 tiles on 16 lanes cost 2.25 groups, not 3:
//
//     output tile 0   [ 16 tiles ][ 16 tiles ][4]--,
//     output tile 1   [ 16 tiles ][ 16 tiles ][4]--|   ragged group of the strip: [4][4][4][4]
//     output tile 2   [ 16 tiles ][ 16 tiles ][4]--|
//     output tile 3   [ 16 tiles ][ 16 tiles ][4]--'
//
// These `segments` output tiles are a strip, the unit of work. A strip lies within one block of the output rotation.
#pragma once

#include <cstdint>
#include <cstring>

#include "shift_matmul_steps.h"

namespace hyper {

struct ShiftLayout {
  int lanes;
  int64_t in_tiles, out_tiles;
  int64_t full_groups;
  int rest;      // input tiles after the full groups
  int segments;  // output tiles of a strip, a power of two; 1 if there is no rest
  int64_t strips;
  int64_t columns;      // in_tiles * 16
  int block_tiles;      // output tiles of a block of the output rotation
  int64_t blocks;

  ShiftLayout(const hyper_shift_plan& plan, int lanes_, int threads) : lanes(lanes_) {
    in_tiles = (plan.in_features + kTile - 1) / kTile;
    out_tiles = (plan.out_features + kTile - 1) / kTile;
    full_groups = in_tiles / lanes;
    rest = static_cast<int>(in_tiles % lanes);
    columns = in_tiles * kTile;
    block_tiles = plan.output_block / kTile;
    blocks = out_tiles / block_tiles;
    segments = 1;
    if (rest > 0) {
      while (2 * segments * rest <= lanes && 2 * segments <= block_tiles) segments *= 2;
      // Few strips would leave threads idle at the end for longer than full lanes save.
      while (segments > 1 && out_tiles / segments < 4 * threads && threads > 1) segments /= 2;
    }
    strips = out_tiles / segments;
  }

  // The rests of `count` output tiles from `first` on, as one group of codes [lanes, words]; unused lanes are zero.
  void gather_rest(const uint32_t* codes, int words, int64_t first, int count, uint32_t* group) const {
    const int64_t run = static_cast<int64_t>(rest) * words;
    for (int s = 0; s < count; ++s) {
      std::memcpy(group + s * run, codes + ((first + s + 1) * in_tiles - rest) * words, run * sizeof(uint32_t));
    }
    std::memset(group + count * run, 0, (lanes * words - count * run) * sizeof(uint32_t));
  }
};

// Sum in float64, which no order of the additions can spoil.
inline float sum_of(const float* values, int64_t count) {
  double sums[4] = {};
  for (int64_t i = 0; i < count; i += 4) {
    for (int j = 0; j < 4; ++j) sums[j] += values[i + j];
  }
  return static_cast<float>(sums[0] + sums[1] + sums[2] + sums[3]);
}

}  // namespace hyper

// Sizes of one weight in tiles and in blocks of the output rotation.
#pragma once

#include <cstdint>

#include "shift_matmul_steps.h"

namespace hyper {

struct ShiftLayout {
  int64_t in_tiles, out_tiles;
  int64_t columns;      // in_tiles * 16
  int64_t tile_words;   // of codes, from an output tile to the next
  int64_t block_tiles;  // output tiles of a block of the output rotation
  int64_t blocks;

  explicit ShiftLayout(const hyper_shift_plan& plan)
      : in_tiles((plan.in_features + kTile - 1) / kTile), out_tiles((plan.out_features + kTile - 1) / kTile),
        columns(in_tiles * kTile), tile_words(in_tiles * 8 * plan.bits), block_tiles(plan.output_block / kTile),
        blocks(out_tiles / block_tiles) {}
};

}  // namespace hyper

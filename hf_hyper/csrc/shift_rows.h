// Rows of byte sums of some output tiles, decoded as many tiles at once as the instruction set in use takes.
#pragma once

#include <cstring>

#include "shift_layout.h"

namespace hyper {

class RowDecoder {
 public:
  // dtype: HYPER_FLOAT32 or HYPER_BFLOAT16
  RowDecoder(const hyper_shift_plan& plan, const uint32_t* codes, int dtype)
      : plan_(plan), codes_(codes), layout_(plan), size_(dtype == HYPER_BFLOAT16 ? 2 : 4),
        at_once_(matmul_steps().tiles[plan.bits - 1]),
        decode_((dtype == HYPER_BFLOAT16 ? matmul_steps().decode_bfloat16 : matmul_steps().decode_float)[plan.bits - 1]) {}

  int tiles_at_once() const { return at_once_; }

  // Byte sums less 510 of output tiles `tile` to `tile + tiles` and of `in_tiles` tiles of columns from `in_tile` on ->
  // to [16 * tiles, 16 * in_tiles], rows `stride` values apart
  void decode(int64_t tile, int64_t tiles, int64_t in_tile, int64_t in_tiles, void* to, int64_t stride) const {
    const int64_t tile_words = layout_.tile_words;
    const uint32_t* from = codes_ + tile * tile_words + in_tile * 8 * plan_.bits;
    char* rows = static_cast<char*>(to);
    for (; tiles > 0; tiles -= at_once_, from += at_once_ * tile_words, rows += at_once_ * kTile * stride * size_) {
      if (tiles >= at_once_) {
        decode_(from, tile_words, in_tiles, plan_.multiplier, rows, stride);
        continue;
      }
      // A last tile, which keeps itself company: the second copy of its rows is dropped.
      for (int64_t t = 0; t < in_tiles; ++t) {
        float both[kMaxTiles * kTile * kTile];
        decode_(from + t * 8 * plan_.bits, 0, 1, plan_.multiplier, both, kTile);
        for (int r = 0; r < kTile; ++r) {
          std::memcpy(rows + (r * stride + t * kTile) * size_, reinterpret_cast<const char*>(both) + r * kTile * size_,
                      kTile * size_);
        }
      }
    }
  }

 private:
  const hyper_shift_plan& plan_;
  const uint32_t* codes_;
  const ShiftLayout layout_;
  const int64_t size_;
  const int at_once_;
  const DecodeStep decode_;
};

}  // namespace hyper

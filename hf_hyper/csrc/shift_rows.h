// Rows of byte sums of some output tiles.
#pragma once

#include "shift_layout.h"

namespace hyper {

class RowDecoder {
 public:
  // dtype: HYPER_FLOAT32 or HYPER_BFLOAT16
  RowDecoder(const hyper_shift_plan& plan, const uint32_t* codes, int dtype)
      : plan_(plan), codes_(codes), layout_(plan), size_(dtype == HYPER_BFLOAT16 ? 2 : 4),
        decode_((dtype == HYPER_BFLOAT16 ? matmul_steps().decode_bfloat16 : matmul_steps().decode_float)[plan.bits - 1]) {}

  // Byte sums less 510 of output tiles `tile` to `tile + tiles` and of `in_tiles` tiles of columns from `in_tile` on ->
  // to [16 * tiles, 16 * in_tiles], rows `stride` values apart
  void decode(int64_t tile, int64_t tiles, int64_t in_tile, int64_t in_tiles, void* to, int64_t stride) const {
    const int64_t tile_words = layout_.tile_words;
    const uint32_t* from = codes_ + tile * tile_words + in_tile * 8 * plan_.bits;
    char* rows = static_cast<char*>(to);
    for (; tiles > 0; --tiles, from += tile_words, rows += kTile * stride * size_) {
      decode_(from, in_tiles, plan_.multiplier, rows, stride);
    }
  }

 private:
  const hyper_shift_plan& plan_;
  const uint32_t* codes_;
  const ShiftLayout layout_;
  const int64_t size_;
  const DecodeStep decode_;
};

}  // namespace hyper

// The weight that stored tensors of `shift` with incoherence stand for, in its own basis.
//
// Some blocks of the output rotation at a time, in one job of the pool with two phases. First the threads take strips
// of columns of a block, small enough for the first-level cache: decode, scale, rotate over the rows. Then they take
// rows, rotate them over their columns, and write.
#include <algorithm>
#include <atomic>
#include <thread>

#include "aligned.h"
#include "float16_inl.h"
#include "shift_matmul.h"
#include "shift_rows.h"
#include "thread_pool.h"

namespace hyper {
namespace {

constexpr int64_t kStripTiles = 2;
constexpr int64_t kStripColumns = kStripTiles * kTile;
constexpr int64_t kWeightsAtOnce = 1 << 19;  // 2 MiB, which stay in the second-level caches of a few threads

class Blocks {
 public:
  Blocks(const hyper_shift_plan& plan, const RowDecoder& decoder, const uint16_t* scale, const uint16_t* out_scale,
         int64_t first, int64_t count, void* weight, int dtype, float* rotated)
      : plan_(plan), decoder_(decoder), scale_(scale), out_scale_(out_scale), weight_(weight), dtype_(dtype),
        rotated_(rotated), steps_(matmul_steps()), layout_(plan), first_(first),
        strips_((layout_.in_tiles + kStripTiles - 1) / kStripTiles),
        rows_(std::min((first + count) * plan.output_block, plan.out_features) - first * plan.output_block),
        to_decode_(count * strips_, 1), to_rotate_(rows_, 4), left_(count * strips_) {}

  void work() {
    alignas(64) float sums[kMaxOutputBlock * kStripColumns];
    int64_t begin, end;
    while (to_decode_.take(&begin, &end)) {
      decode(begin / strips_, begin % strips_ * kStripTiles, sums);
      left_.fetch_sub(1, std::memory_order_release);
    }
    for (int spin = 0; left_.load(std::memory_order_acquire) > 0; ++spin) {
      if (spin > 10000) std::this_thread::yield();
    }
    while (to_rotate_.take(&begin, &end)) {
      for (int64_t row = begin; row < end; ++row) rotate(row);
    }
  }

 private:
  // Tiles of columns from `tile` on, of a block.
  void decode(int64_t block, int64_t tile, float* sums) {
    const int64_t tiles = std::min(kStripTiles, layout_.in_tiles - tile), first = (first_ + block) * plan_.output_block;
    float units[kMaxOutputBlock];
    for (int64_t r = 0; r < plan_.output_block; ++r) {
      units[r] = from_float16(scale_[first + r]) * plan_.inverse_deviation;
    }
    decoder_.decode(first / kTile, layout_.block_tiles, tile, tiles, sums, tiles * kTile);
    steps_.rotate_columns(plan_, first, units, sums, tiles * kTile,
                          rotated_ + block * plan_.output_block * layout_.columns + tile * kTile, layout_.columns);
  }

  void rotate(int64_t row) {
    const int64_t to = first_ * plan_.output_block + row;
    steps_.unrotate_input(plan_, rotated_ + row * layout_.columns, from_bfloat16(out_scale_[to]), dtype_, weight_,
                          to * plan_.in_features);
  }

  const hyper_shift_plan& plan_;
  const RowDecoder& decoder_;
  const uint16_t *scale_, *out_scale_;
  void* weight_;
  const int dtype_;
  float* rotated_;  // [count * output_block, columns]
  const MatmulSteps& steps_;
  const ShiftLayout layout_;
  const int64_t first_, strips_, rows_;  // first block, strips of a block, rows of the weight
  WorkCounter to_decode_, to_rotate_;
  std::atomic<int64_t> left_;
};

}  // namespace

void decode_weight(const hyper_shift_plan& plan, const uint32_t* codes, const uint16_t* scale, const uint16_t* out_scale,
                   int threads, void* weight, int dtype) {
  static thread_local AlignedVector<float> rotated;  // fresh pages would cost more than decoding
  const ShiftLayout layout(plan);
  const RowDecoder decoder(plan, codes, HYPER_FLOAT32);
  const int64_t size = plan.output_block * layout.columns, step = std::max<int64_t>(1, kWeightsAtOnce / size);
  rotated.resize(static_cast<size_t>(std::min(step, layout.blocks) * size));
  for (int64_t first = 0; first < layout.blocks; first += step) {
    Blocks blocks(plan, decoder, scale, out_scale, first, std::min(step, layout.blocks - first), weight, dtype,
                  rotated.data());
    run_on_threads(threads, [&] { blocks.work(); });
  }
}

}  // namespace hyper

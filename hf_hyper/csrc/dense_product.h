// Product for many tokens with any weight that decodes to panels (dense_steps.h).
//
// One job of the pool in two phases. First the threads take tokens and round them to bfloat16. Then they take 32 rows of
// the weight at a time: decode a panel, multiply it with all tokens, go on to the next columns, and hand over the sums.
#pragma once

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "dense_steps.h"
#include "thread_pool.h"

namespace hyper {

constexpr int64_t kTokensAtOnce = 512;

struct DenseSpace {
  std::vector<uint16_t> activations;  // [panels of a row, blocks of tokens], each as in dense_steps.h
};

// `Weight` has
//   columns()                             of a row, padded to whole tiles
//   row_blocks()                          of 32 rows, the last one padded
//   load(token, values)                   activations of one token, [columns] float
//   decode(block, tile, tiles, weights)   a panel of some tiles of columns
//   finish(block, sums)                   of all tokens, [tokens, 2, 16]
template <class Weight>
class DenseProduct {
 public:
  DenseProduct(Weight& weight, const DenseSteps& steps, int64_t tokens, DenseSpace& space)
      : weight_(weight), steps_(steps), tokens_(tokens), blocks_((tokens + kDenseTokens - 1) / kDenseTokens),
        tiles_(weight.columns() / kTile), to_load_(tokens, 1), to_multiply_(weight.row_blocks(), 1) {
    space.activations.resize(static_cast<size_t>(tokens * weight.columns()));
    activations_ = space.activations.data();
  }

  void run(int threads) {
    run_on_threads(threads, [this] { work(); });
  }

 private:
  void work() {
    std::vector<float> values(weight_.columns());
    int64_t begin, end;
    while (to_load_.take(&begin, &end)) {
      weight_.load(begin, values.data());
      arrange(begin, values.data());
      loaded_.fetch_add(1, std::memory_order_release);
    }
    static thread_local std::vector<float> sums;  // kept: fresh pages would cost more than decoding
    sums.resize(static_cast<size_t>(tokens_ * kPanelRows));
    for (int spin = 0; loaded_.load(std::memory_order_acquire) < tokens_; ++spin) {
      if (spin > 10000) std::this_thread::yield();
    }
    while (to_multiply_.take(&begin, &end)) multiply(begin, sums.data());
  }

  // Blocks differ by one token at most, so that none is left with few.
  int64_t first_token(int64_t block) const { return tokens_ * block / blocks_; }

  // Of the activations of the panel that begins with this tile.
  uint16_t* panel(int64_t tile) const { return activations_ + tile * kTile * tokens_; }

  int64_t panel_tiles(int64_t tile) const { return std::min<int64_t>(kPanelTiles, tiles_ - tile); }

  void arrange(int64_t token, const float* values) {
    int64_t block = token * blocks_ / tokens_;
    while (first_token(block + 1) <= token) ++block;
    const int64_t first = first_token(block);
    const int count = static_cast<int>(first_token(block + 1) - first);
    for (int64_t tile = 0; tile < tiles_; tile += kPanelTiles) {
      const int64_t columns = panel_tiles(tile) * kTile;
      steps_.arrange(values + tile * kTile, columns, static_cast<int>(token - first), count,
                     panel(tile) + first * columns);
    }
  }

  void multiply(int64_t row_block, float* sums) {
    alignas(64) uint16_t weights[kPanelSteps * kStepValues];
    for (int64_t tile = 0; tile < tiles_; tile += kPanelTiles) {
      const int64_t columns = panel_tiles(tile) * kTile;
      weight_.decode(row_block, tile, panel_tiles(tile), weights);
      for (int64_t block = 0; block < blocks_; ++block) {
        const int64_t first = first_token(block), count = first_token(block + 1) - first;
        steps_.multiply[count - 1](weights, panel(tile) + first * columns, columns / 2, tile == 0,
                                   sums + first * kPanelRows);
      }
    }
    weight_.finish(row_block, sums);
  }

  Weight& weight_;
  const DenseSteps& steps_;
  const int64_t tokens_, blocks_, tiles_;
  uint16_t* activations_;
  WorkCounter to_load_, to_multiply_;
  std::atomic<int64_t> loaded_{0};
};

}  // namespace hyper

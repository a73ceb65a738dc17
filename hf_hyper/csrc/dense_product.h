// Product for many tokens with any weight that decodes to panels (dense_steps.h).
//
// One job of the pool in two phases. First the threads take tokens and round them to bfloat16. Then they take 32 rows of
// the weight at a time: decode a panel, multiply it with all tokens, go on to the next columns, and hand over the sums.
#pragma once

#include <algorithm>
#include <atomic>
#include <thread>

#include "aligned.h"
#include "dense_steps.h"
#include "thread_pool.h"

namespace hyper {

constexpr int64_t kTokensAtOnce = 512;
constexpr int64_t kLeastPart = 64;  // tokens of a part at least: every part decodes the weight
constexpr int64_t kRowsPerToken = 2;

// Calls multiply(first token, tokens, threads) for parts of the tokens, of up to kTokensAtOnce. Threads share the rows of
// the weight or, where those are few beside the tokens, the tokens: no thread then reads what another one wrote, at the
// price of decoding a small weight once per thread.
// Parts differ by one token at most, so that results do not depend on their number.
template <class Multiply>
void in_parts(int64_t rows, int64_t tokens, int threads, Multiply multiply) {
  const bool apart = threads > 1 && tokens / threads >= kLeastPart && rows <= kRowsPerToken * tokens;
  const int64_t rounds = apart ? threads : 1, most = rounds * kTokensAtOnce;
  const int64_t parts = (tokens + most - 1) / most * rounds;
  WorkCounter work(parts, 1);
  run_on_threads(apart ? threads : 1, [&] {
    int64_t part, end;
    while (work.take(&part, &end)) {
      const int64_t begin = tokens * part / parts;
      multiply(begin, tokens * end / parts - begin, apart ? 1 : threads);
    }
  });
}

struct DenseSpace {
  AlignedVector<uint16_t> activations;  // [panels, tokens, kPanelColumns]
};

// `Weight` has
//   columns()                             of a row, padded to whole tiles
//   row_blocks()                          of 32 rows, the last one padded
//   load(token, values)                   activations of one token, [columns] float
//   loaded(token, sum)                    of those
//   decode(block, tile, tiles, weights)   a panel of some tiles of columns
//   finish(block, sums)                   of all tokens, [tokens, 2, 16]
template <class Weight>
class DenseProduct {
 public:
  DenseProduct(Weight& weight, const DenseSteps& steps, int64_t tokens, int threads, DenseSpace& space)
      : weight_(weight), steps_(steps), tokens_(tokens), blocks_((tokens + kDenseTokens - 1) / kDenseTokens),
        tiles_(weight.columns() / kTile), panels_((tiles_ + kPanelTiles - 1) / kPanelTiles),
        to_load_(tokens, std::max<int64_t>(1, std::min<int64_t>(16, tokens / (8 * threads)))),
        to_multiply_(weight.row_blocks(), 1) {
    space.activations.resize(static_cast<size_t>(panels_ * tokens * kPanelColumns));
    activations_ = space.activations.data();
  }

  void run(int threads) {
    run_on_threads(threads, [this] { work(); });
  }

 private:
  void work() {
    static thread_local AlignedVector<float> kept_values, kept_sums;  // fresh pages would cost more than decoding
    AlignedVector<float>&values = kept_values, &sums = kept_sums;
    values.resize(static_cast<size_t>(weight_.columns()));
    int64_t begin, end;
    while (to_load_.take(&begin, &end)) {
      for (int64_t token = begin; token < end; ++token) load(token, values.data());
      loaded_.fetch_add(end - begin, std::memory_order_release);
    }
    sums.resize(static_cast<size_t>(tokens_ * kPanelRows));
    for (int spin = 0; loaded_.load(std::memory_order_acquire) < tokens_; ++spin) {
      if (spin > 10000) std::this_thread::yield();
    }
    while (to_multiply_.take(&begin, &end)) multiply(begin, sums.data());
  }

  // Blocks differ by one token at most, and panels by one tile, so that none is left with few.
  int64_t first_token(int64_t block) const { return tokens_ * block / blocks_; }
  int64_t first_tile(int64_t panel) const { return tiles_ * panel / panels_; }

  uint16_t* activations(int64_t panel, int64_t token) const {
    return activations_ + (panel * tokens_ + token) * kPanelColumns;
  }

  void load(int64_t token, float* values) {
    weight_.load(token, values);
    double sum = 0;
    for (int64_t panel = 0; panel < panels_; ++panel) {
      const int64_t tile = first_tile(panel);
      sum += steps_.round(values + tile * kTile, (first_tile(panel + 1) - tile) * kTile, activations(panel, token));
    }
    weight_.loaded(token, static_cast<float>(sum));
  }

  void multiply(int64_t row_block, float* sums) {
    alignas(64) uint16_t weights[kPanelSteps * kStepValues];
    for (int64_t panel = 0; panel < panels_; ++panel) {
      const int64_t tile = first_tile(panel), tiles = first_tile(panel + 1) - tile;
      weight_.decode(row_block, tile, tiles, weights);
      for (int64_t block = 0; block < blocks_; ++block) {
        const int64_t token = first_token(block);
        steps_.multiply[first_token(block + 1) - token - 1](weights, activations(panel, token), tiles * kTile / 2,
                                                            panel == 0, sums + token * kPanelRows);
      }
    }
    weight_.finish(row_block, sums);
  }

  Weight& weight_;
  const DenseSteps& steps_;
  const int64_t tokens_, blocks_, tiles_, panels_;
  uint16_t* activations_;
  WorkCounter to_load_, to_multiply_;
  std::atomic<int64_t> loaded_{0};
};

}  // namespace hyper

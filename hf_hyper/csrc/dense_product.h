// Product for many tokens with any weight that decodes to panels (dense_steps.h).
//
// One job of the pool in two phases. First the threads take tokens and round them, to bfloat16 or to bytes. Then they
// take a stripe of 128 rows of the weight at a time: decode its panels of some columns, multiply them with all tokens, go
// on to the next columns, and hand over the sums. Activations, which may fill more than the caches near a core, are read
// once per stripe. What is left when every thread has had as many stripes is shared by 32 rows.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>
#include <vector>

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

// Panels of the columns of a weight, and the places of tokens in them. Panels differ by one tile at most, so that none is
// left with few.
struct PanelGrid {
  PanelGrid(int64_t columns, int64_t tokens, int most)
      : tiles(columns / kTile), panels((tiles + most - 1) / most), tokens(tokens), width(most * kTile) {}

  int64_t first_tile(int64_t panel) const { return tiles * panel / panels; }
  int64_t first_column(int64_t panel) const { return first_tile(panel) * kTile; }
  int64_t place(int64_t panel, int64_t token) const { return panel * tokens + token; }

  const int64_t tiles, panels, tokens, width;
};

// Space that is kept from call to call: fresh pages would cost more than decoding.
template <class T>
T* at_least(AlignedVector<T>& kept, int64_t size) {
  if (static_cast<int64_t>(kept.size()) < size) {
    kept.clear();  // what it held is not wanted
    kept.resize(static_cast<size_t>(size));
  }
  return kept.data();
}

// How activations and panels are held: in bfloat16.
class Pairs {
 public:
  using Activation = uint16_t;
  using Panel = uint16_t;
  static constexpr int kPanelTiles = kPairTiles;
  static constexpr int64_t kColumns = 2;  // of a step

  explicit Pairs(const DenseSteps& steps) : steps_(steps) {}
  void resize(int64_t) {}

  // values, row [columns of the weight]: space
  template <class Weight>
  void load(Weight& weight, const PanelGrid& grid, int64_t token, float* values, uint16_t* row,
            uint16_t* activations) {
    if (grid.panels == 1) return weight.load(token, values, activations + token * grid.width);
    weight.load(token, values, row);
    for (int64_t panel = 0; panel < grid.panels; ++panel) {
      const int64_t from = grid.first_column(panel), columns = grid.first_column(panel + 1) - from;
      std::memcpy(activations + grid.place(panel, token) * grid.width, row + from, columns * sizeof *row);
    }
  }

  void multiply(const uint16_t* weights, const uint16_t* activations, int64_t, int64_t tokens, int64_t steps,
                bool fresh, float* sums) const {
    steps_.multiply[tokens - 1](weights, activations, steps, fresh, sums);
  }

 private:
  const DenseSteps& steps_;
};

// In bytes.
class Bytes {
 public:
  using Activation = int8_t;
  using Panel = uint8_t;
  static constexpr int kPanelTiles = kByteTiles;
  static constexpr int64_t kColumns = 4;

  explicit Bytes(const DenseSteps& steps) : steps_(steps) {}
  void resize(int64_t places) {
    static thread_local AlignedVector<ByteScale> kept;
    scales_ = at_least(kept, places);
  }

  template <class Weight>
  void load(Weight& weight, const PanelGrid& grid, int64_t token, float* values, int8_t*, int8_t* activations) {
    weight.load(token, values);
    double sum = 0;
    for (int64_t panel = 0; panel < grid.panels; ++panel) {
      const int64_t from = grid.first_column(panel), to = grid.place(panel, token);
      sum += steps_.round_bytes(values + from, grid.first_column(panel + 1) - from, activations + to * grid.width,
                                scales_ + to);
    }
    weight.loaded(token, static_cast<float>(sum));
  }

  void multiply(const uint8_t* weights, const int8_t* activations, int64_t place, int64_t tokens, int64_t steps,
                bool fresh, float* sums) const {
    steps_.multiply_bytes[tokens - 1](weights, activations, scales_ + place, steps, fresh, sums);
  }

 private:
  const DenseSteps& steps_;
  ByteScale* scales_ = nullptr;  // [panels, tokens]
};

// `Weight` has
//   columns(), rows()                        padded to whole tiles
//   load(token, values, rounded)             activations of one token, [columns] bfloat16; values [columns] are overwritten
//   decode(row_block, tile, tiles, weights)  a panel of 32 rows, the last ones padded, as the form has them
//   finish(first_row, rows, tokens, sums)    sums [blocks of 32 rows, tokens, 2, 16] of a stripe
// and for bytes
//   load(token, values)                      [columns] float
//   loaded(token, sum)                       of those, rounded
template <class Form, class Weight>
class DenseProduct {
 public:
  DenseProduct(Weight& weight, const DenseSteps& steps, int64_t tokens, int threads)
      : weight_(weight), form_(steps), grid_(weight.columns(), tokens, Form::kPanelTiles),
        row_blocks_((weight.rows() + kPanelRows - 1) / kPanelRows),
        whole_(weight.rows() / kStripeRows / threads * threads), shared_(row_blocks_ - whole_ * kStripeBlocks),
        to_load_(tokens, std::max<int64_t>(1, std::min<int64_t>(16, tokens / (8 * threads)))),
        to_multiply_(whole_ + shared_, 1), done_(static_cast<size_t>((shared_ + kStripeBlocks - 1) / kStripeBlocks)) {
    static thread_local AlignedVector<typename Form::Activation> kept;
    static thread_local AlignedVector<float> sums;
    // Those of some tokens more are fetched but not used.
    activations_ = at_least(kept, (grid_.panels * tokens + kDenseTokens) * grid_.width);
    shared_sums_ = at_least(sums, shared_ * tokens * kPanelRows);
    for (auto& blocks : done_) blocks.store(0, std::memory_order_relaxed);
    form_.resize(grid_.panels * tokens);
  }

  void run(int threads) {
    run_on_threads(threads, [this] { work(); });
  }

 private:
  static constexpr int64_t kStripeBlocks = kStripeRows / kPanelRows;
  static constexpr int64_t kPanelWeights = int64_t{Form::kPanelTiles} * kTile * kPanelRows;

  void work() {
    load_tokens();
    for (int spin = 0; loaded_.load(std::memory_order_acquire) < grid_.tokens; ++spin) {
      if (spin > 10000) std::this_thread::yield();
    }
    static thread_local AlignedVector<float> kept;
    int64_t item, end;
    while (to_multiply_.take(&item, &end)) {
      if (item < whole_) {
        float* sums = at_least(kept, kStripeRows * grid_.tokens);
        multiply(item * kStripeBlocks, kStripeBlocks, sums);
        finish(item, sums);
      } else {
        multiply_shared(item - whole_);
      }
    }
  }

  // Allocates before it takes tokens: an exception after that would leave the others waiting for them.
  void load_tokens() {
    static thread_local AlignedVector<float> kept;
    static thread_local AlignedVector<typename Form::Activation> kept_row;
    float* values = at_least(kept, weight_.columns());
    typename Form::Activation* row = at_least(kept_row, weight_.columns());
    int64_t begin, end;
    while (to_load_.take(&begin, &end)) {
      for (int64_t token = begin; token < end; ++token) form_.load(weight_, grid_, token, values, row, activations_);
      loaded_.fetch_add(end - begin, std::memory_order_release);
    }
  }

  // One row block of those that are shared. Whoever ends the last one of a stripe hands that over.
  void multiply_shared(int64_t block) {
    const int64_t stripe = block / kStripeBlocks;
    multiply(whole_ * kStripeBlocks + block, 1, shared_sums_ + block * grid_.tokens * kPanelRows);
    const int64_t blocks = std::min(kStripeBlocks, shared_ - stripe * kStripeBlocks);
    if (done_[stripe].fetch_add(1, std::memory_order_acq_rel) + 1 < blocks) return;
    finish(whole_ + stripe, shared_sums_ + stripe * kStripeRows * grid_.tokens);
  }

  void finish(int64_t stripe, const float* sums) {
    const int64_t first = stripe * kStripeRows, rows = std::min<int64_t>(kStripeRows, weight_.rows() - first);
    weight_.finish(first, rows, grid_.tokens, sums);
  }

  // Blocks of 32 rows -> sums [count, tokens, 2, 16]. Blocks of tokens differ by one at most.
  void multiply(int64_t first, int64_t count, float* sums) {
    static thread_local AlignedVector<typename Form::Panel> kept;
    typename Form::Panel* weights = at_least(kept, count * kPanelWeights);
    const int64_t tokens = grid_.tokens, blocks = (tokens + kDenseTokens - 1) / kDenseTokens;
    for (int64_t panel = 0; panel < grid_.panels; ++panel) {
      const int64_t tile = grid_.first_tile(panel), tiles = grid_.first_tile(panel + 1) - tile;
      for (int64_t r = 0; r < count; ++r) weight_.decode(first + r, tile, tiles, weights + r * kPanelWeights);
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t token = tokens * block / blocks, together = tokens * (block + 1) / blocks - token;
        const int64_t place = grid_.place(panel, token);
        const auto* from = activations_ + place * grid_.width;
        const int64_t share = together * grid_.width / count;
        for (int64_t r = 0; r < count; ++r) {
          if (grid_.panels > 1) fetch(from + count * share + r * share, share);
          form_.multiply(weights + r * kPanelWeights, from, place, together, tiles * kTile / Form::kColumns, panel == 0,
                         sums + (r * tokens + token) * kPanelRows);
        }
      }
    }
  }

  // Activations of the next tokens, into the cache of the core: a dozen of them, read side by side, look like no stream
  // to the processor.
  static void fetch(const typename Form::Activation* from, int64_t count) {
    constexpr int64_t kLine = 64 / sizeof *from;
    for (int64_t i = 0; i < count; i += kLine) __builtin_prefetch(from + i, 0, 2);
  }

  Weight& weight_;
  Form form_;
  const PanelGrid grid_;
  const int64_t row_blocks_, whole_, shared_;  // blocks of 32 rows, stripes taken whole, blocks that are shared
  typename Form::Activation* activations_;     // [panels, tokens, columns of the widest panel]
  float* shared_sums_;                         // [shared_, tokens, 2, 16]
  WorkCounter to_load_, to_multiply_;
  std::atomic<int64_t> loaded_{0};
  std::vector<std::atomic<int>> done_;  // blocks of the shared stripes
};

}  // namespace hyper

// Product for many tokens with any weight that decodes to panels (dense_steps.h).
//
// One job of the pool in two phases. First the threads take tokens and round them, to bfloat16 or to bytes. Then they
// take a stripe of up to 128 rows of the weight at a time: decode its panels of some columns, multiply them with all
// tokens, go on to the next columns, and hand over the sums. Activations, which may fill more than the caches near a
// core, are read once per stripe.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>

#include "aligned.h"
#include "dense_steps.h"
#include "thread_pool.h"

namespace hyper {

constexpr int64_t kTokensAtOnce = 512;
constexpr int64_t kLeastShared = 8;  // tokens of a part of a stripe; fewer than 4 at a time would be added in another order
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

// How activations and panels are held: in bfloat16.
class Pairs {
 public:
  using Activation = uint16_t;
  using Weight = uint16_t;
  static constexpr int kPanelTiles = kPairTiles;
  static constexpr int64_t kColumns = 2;  // of a step

  explicit Pairs(const DenseSteps& steps) : steps_(steps) {}
  void resize(int64_t) {}

  // `row` is space for one token.
  template <class Weight>
  void load(Weight& weight, const PanelGrid& grid, int64_t token, float* values, uint16_t* row, uint16_t* activations) {
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
  using Weight = uint8_t;
  static constexpr int kPanelTiles = kByteTiles;
  static constexpr int64_t kColumns = 4;

  explicit Bytes(const DenseSteps& steps) : steps_(steps) {}
  void resize(int64_t places) {
    static thread_local AlignedVector<ByteScale> kept;
    kept.resize(static_cast<size_t>(places));
    scales_ = kept.data();
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

// A stripe of the weight and the tokens it meets.
struct StripeOfTokens {
  int64_t first_row, rows, first_token, tokens;
};

// Deals stripes to threads. Those left when every thread has had as many as the others are shared by tokens: their
// weights are then decoded more than once.
class Stripes {
 public:
  // Stripes consist of `together` rows or a multiple of that.
  Stripes(int64_t rows, int64_t together, int64_t tokens, int threads)
      : rows_(rows), stripe_(together * std::clamp<int64_t>((rows + together - 1) / together / (2 * threads), 1,
                                                            kStripeRows / together)),
        tokens_(tokens), whole_(stripes() / threads * threads), shared_(stripes() - whole_),
        parts_(shared_ == 0 ? 1 : std::max<int64_t>(1, std::min(threads / shared_, tokens / kLeastShared))),
        work_(whole_ + shared_ * parts_, 1) {}

  bool take(StripeOfTokens* stripe) {
    int64_t item, end;
    if (!work_.take(&item, &end)) return false;
    const int64_t parts = item < whole_ ? 1 : parts_, part = item < whole_ ? 0 : (item - whole_) % parts_;
    const int64_t first_row = (item < whole_ ? item : whole_ + (item - whole_) / parts_) * stripe_;
    const int64_t first_token = tokens_ * part / parts;
    *stripe = {first_row, std::min(stripe_, rows_ - first_row), first_token, tokens_ * (part + 1) / parts - first_token};
    return true;
  }

 private:
  int64_t stripes() const { return (rows_ + stripe_ - 1) / stripe_; }

  const int64_t rows_, stripe_, tokens_, whole_, shared_, parts_;
  WorkCounter work_;
};

// `Weight` has
//   columns()                                of a row, padded to whole tiles
//   rows()                                   the same
//   rows_together()                          32 or more, a divisor of 128: rows that are finished together
//   load(token, values, rounded)             activations of one token, [columns] bfloat16; values [columns] are overwritten
//   decode(row_block, tile, tiles, weights)  a panel of 32 rows, the last ones padded, in the form's weights
//   finish(stripe, sums)                     [blocks of 32 rows, tokens, 2, 16] of a stripe
// and for bytes
//   load(token, values)                      [columns] float
//   loaded(token, sum)                       of those, rounded
template <class Form, class Weight>
class DenseProduct {
 public:
  DenseProduct(Weight& weight, const DenseSteps& steps, int64_t tokens, int threads)
      : weight_(weight), form_(steps), grid_(weight.columns(), tokens, Form::kPanelTiles),
        to_load_(tokens, std::max<int64_t>(1, std::min<int64_t>(16, tokens / (8 * threads)))),
        to_multiply_(weight.rows(), weight.rows_together(), tokens, threads) {
    static thread_local AlignedVector<typename Form::Activation> kept;
    kept.resize(static_cast<size_t>((grid_.panels * tokens + kDenseTokens) * grid_.width));  // the last are fetched only
    activations_ = kept.data();
    form_.resize(grid_.panels * tokens);
  }

  void run(int threads) {
    run_on_threads(threads, [this] { work(); });
  }

 private:
  static constexpr int64_t kPanelWeights = int64_t{Form::kPanelTiles} * kTile * kPanelRows;

  // Kept by every thread: fresh pages would cost more than decoding.
  struct Space {
    AlignedVector<float> values, sums;
    AlignedVector<typename Form::Activation> row;
    AlignedVector<typename Form::Weight> weights;  // [blocks of 32 rows, kPanelWeights]
  };

  void work() {
    static thread_local Space space;
    space.values.resize(static_cast<size_t>(weight_.columns()));
    space.row.resize(static_cast<size_t>(weight_.columns()));
    int64_t begin, end;
    while (to_load_.take(&begin, &end)) {
      for (int64_t token = begin; token < end; ++token) {
        form_.load(weight_, grid_, token, space.values.data(), space.row.data(), activations_);
      }
      loaded_.fetch_add(end - begin, std::memory_order_release);
    }
    for (int spin = 0; loaded_.load(std::memory_order_acquire) < grid_.tokens; ++spin) {
      if (spin > 10000) std::this_thread::yield();
    }
    StripeOfTokens stripe;
    while (to_multiply_.take(&stripe)) multiply(stripe, space);
  }

  // Blocks of tokens differ by one at most.
  void multiply(const StripeOfTokens& stripe, Space& space) {
    const int64_t row_blocks = (stripe.rows + kPanelRows - 1) / kPanelRows;
    const int64_t blocks = (stripe.tokens + kDenseTokens - 1) / kDenseTokens;
    space.sums.resize(static_cast<size_t>(row_blocks * stripe.tokens * kPanelRows));
    space.weights.resize(static_cast<size_t>(row_blocks * kPanelWeights));
    for (int64_t panel = 0; panel < grid_.panels; ++panel) {
      const int64_t tile = grid_.first_tile(panel), tiles = grid_.first_tile(panel + 1) - tile;
      for (int64_t r = 0; r < row_blocks; ++r) {
        weight_.decode(stripe.first_row / kPanelRows + r, tile, tiles, space.weights.data() + r * kPanelWeights);
      }
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t token = stripe.tokens * block / blocks, next = stripe.tokens * (block + 1) / blocks;
        const int64_t from = grid_.place(panel, stripe.first_token + token);
        const auto* ahead = activations_ + (from + next - token) * grid_.width;
        const int64_t share = kDenseTokens * grid_.width / row_blocks;
        for (int64_t r = 0; r < row_blocks; ++r) {
          if (grid_.panels > 1) fetch(ahead + r * share, ahead + (r + 1) * share);
          form_.multiply(space.weights.data() + r * kPanelWeights, activations_ + from * grid_.width, from, next - token,
                         tiles * kTile / Form::kColumns, panel == 0,
                         space.sums.data() + (r * stripe.tokens + token) * kPanelRows);
        }
      }
    }
    weight_.finish(stripe, space.sums.data());
  }

  // Into the cache of the core: a dozen tokens, read side by side, look like no stream to the processor.
  static void fetch(const typename Form::Activation* from, const typename Form::Activation* end) {
    for (; from < end; from += 64 / sizeof *from) __builtin_prefetch(from, 0, 2);
  }

  Weight& weight_;
  Form form_;
  const PanelGrid grid_;
  typename Form::Activation* activations_;  // [panels, tokens, columns of the widest panel]
  WorkCounter to_load_;
  Stripes to_multiply_;
  std::atomic<int64_t> loaded_{0};
};

}  // namespace hyper

// Product for many tokens with any weight that decodes to panels (dense_steps.h).
//
// One job of the pool in two phases. First the threads take tokens and round them, to bfloat16 or to bytes. Then they
// take 32 rows of the weight at a time: decode a panel, multiply it with all tokens, go on to the next columns, and hand
// over the sums.
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

// How activations and panels are held: in bfloat16.
class Pairs {
 public:
  using Activation = uint16_t;
  using Weight = uint16_t;
  static constexpr int64_t kColumns = 2;  // of a step

  explicit Pairs(const DenseSteps& steps) : steps_(steps) {}
  void resize(int64_t) {}

  double round(const float* values, int64_t columns, int64_t, uint16_t* activations) {
    return steps_.round(values, columns, activations);
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
  static constexpr int64_t kColumns = 4;

  explicit Bytes(const DenseSteps& steps) : steps_(steps) {}
  void resize(int64_t places) {
    static thread_local AlignedVector<ByteScale> kept;
    kept.resize(static_cast<size_t>(places));
    scales_ = kept.data();
  }

  double round(const float* values, int64_t columns, int64_t place, int8_t* activations) {
    return steps_.round_bytes(values, columns, activations, scales_ + place);
  }
  void multiply(const uint8_t* weights, const int8_t* activations, int64_t place, int64_t tokens, int64_t steps,
                bool fresh, float* sums) const {
    steps_.multiply_bytes[tokens - 1](weights, activations, scales_ + place, steps, fresh, sums);
  }

 private:
  const DenseSteps& steps_;
  ByteScale* scales_ = nullptr;  // [panels, tokens]
};

// Of one token and of one block of rows, kept by every thread: fresh pages would cost more than decoding.
struct DenseSpace {
  AlignedVector<float> values, sums;
};

inline DenseSpace& dense_space() {
  static thread_local DenseSpace space;
  return space;
}

// `Weight` has
//   columns()                             of a row, padded to whole tiles
//   row_blocks()                          of 32 rows, the last one padded
//   load(token, values)                   activations of one token, [columns] float
//   loaded(token, sum)                    of those
//   decode(block, tile, tiles, weights)   a panel of some tiles of columns, in the form's weights
//   finish(block, sums)                   of all tokens, [tokens, 2, 16]
template <class Form, class Weight>
class DenseProduct {
 public:
  DenseProduct(Weight& weight, const DenseSteps& steps, int64_t tokens, int threads)
      : weight_(weight), form_(steps), tokens_(tokens), blocks_((tokens + kDenseTokens - 1) / kDenseTokens),
        tiles_(weight.columns() / kTile), panels_((tiles_ + kPanelTiles - 1) / kPanelTiles),
        to_load_(tokens, std::max<int64_t>(1, std::min<int64_t>(16, tokens / (8 * threads)))),
        to_multiply_(weight.row_blocks(), 1) {
    static thread_local AlignedVector<typename Form::Activation> kept;
    kept.resize(static_cast<size_t>(panels_ * tokens * kPanelColumns));
    activations_ = kept.data();
    form_.resize(panels_ * tokens);
  }

  void run(int threads) {
    run_on_threads(threads, [this] { work(); });
  }

 private:
  void work() {
    auto& [values, sums] = dense_space();
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

  int64_t place(int64_t panel, int64_t token) const { return panel * tokens_ + token; }

  void load(int64_t token, float* values) {
    weight_.load(token, values);
    double sum = 0;
    for (int64_t panel = 0; panel < panels_; ++panel) {
      const int64_t tile = first_tile(panel);
      const int64_t to = place(panel, token);
      sum += form_.round(values + tile * kTile, (first_tile(panel + 1) - tile) * kTile, to,
                         activations_ + to * kPanelColumns);
    }
    weight_.loaded(token, static_cast<float>(sum));
  }

  void multiply(int64_t row_block, float* sums) {
    alignas(64) typename Form::Weight weights[kPanelColumns * kPanelRows];
    for (int64_t panel = 0; panel < panels_; ++panel) {
      const int64_t tile = first_tile(panel), tiles = first_tile(panel + 1) - tile;
      weight_.decode(row_block, tile, tiles, weights);
      for (int64_t block = 0; block < blocks_; ++block) {
        const int64_t token = first_token(block), from = place(panel, token);
        form_.multiply(weights, activations_ + from * kPanelColumns, from, first_token(block + 1) - token,
                       tiles * kTile / Form::kColumns, panel == 0, sums + token * kPanelRows);
      }
    }
    weight_.finish(row_block, sums);
  }

  Weight& weight_;
  Form form_;
  const int64_t tokens_, blocks_, tiles_, panels_;
  typename Form::Activation* activations_;  // [panels, tokens, kPanelColumns]
  WorkCounter to_load_, to_multiply_;
  std::atomic<int64_t> loaded_{0};
};

}  // namespace hyper

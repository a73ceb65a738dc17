// Product for many tokens: every output tile is decoded once, into the second-level cache, and serves all of them.
//
// One job of the pool in two phases. First the threads take tokens, rotate them and round them to bfloat16. Then they
// take output tiles: decode, multiply with one block of tokens after the other, scale; whoever finishes the last tile of
// an output block rotates that block back and writes it.
//
// Products are taken in chunks of columns, small enough that the activations of a block of tokens stay in the first-level
// cache while the rows of the tile pass by.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>
#include <vector>

#include "float16_inl.h"
#include "shift_dense_steps.h"
#include "shift_matmul.h"
#include "shift_matmul_layout.h"
#include "thread_pool.h"

namespace hyper {
namespace {

constexpr int64_t kChunkSteps = 64;  // 4 KiB a row or token
constexpr int64_t kTokensAtOnce = 512;
constexpr int kLanes = 16;

struct Workspace {
  std::vector<uint16_t> activations;   // blocks of tokens one after the other
  std::vector<float> product;          // [output blocks, tokens, output_block]
  std::vector<float> sums;             // of each token's rotated values
  std::vector<std::atomic<int>> done;  // output tiles finished, by block
};

class Dense {
 public:
  Dense(const hyper_shift_plan& plan, const DenseSteps& steps, const uint32_t* codes, const uint16_t* scale,
        const uint16_t* out_scale, const char* x, int dtype, int64_t tokens, char* y, Workspace& space)
      : plan_(plan), codes_(codes), scale_(scale), out_scale_(out_scale), x_(x), y_(y), dtype_(dtype),
        size_(dtype == HYPER_FLOAT32 ? 4 : 2), tokens_(tokens), blocks_((tokens + kDenseTokens - 1) / kDenseTokens),
        dense_(steps), common_(matmul_steps()), layout_(plan, kLanes, 1),
        rest_steps_((layout_.rest * kTile + kStepValues - 1) / kStepValues),
        steps_(layout_.full_groups * kGroupSteps + rest_steps_), space_(space), to_rotate_(tokens, 1),
        tiles_(layout_.out_tiles, 1) {
    space.activations.resize(tokens * steps_ * kStepValues + kStepValues);
    space.product.resize(tokens * layout_.out_tiles * kTile);
    space.sums.resize(tokens);
    if (static_cast<int64_t>(space.done.size()) < layout_.blocks) {
      space.done = std::vector<std::atomic<int>>(layout_.blocks);
    }
    for (int64_t block = 0; block < layout_.blocks; ++block) space.done[block].store(0, std::memory_order_relaxed);
    const auto address = reinterpret_cast<uintptr_t>(space.activations.data());
    activations_ = space.activations.data() + (64 - address % 64) % 64 / 2;
  }

  void run(int threads) {
    run_on_threads(threads, [this] { work(); });
  }

 private:
  void work() {
    std::vector<float> values(layout_.columns + kLanes * kTile);
    int64_t begin, end;
    while (to_rotate_.take(&begin, &end)) {
      rotate(begin, values.data());
      rotated_.fetch_add(1, std::memory_order_release);
    }
    static thread_local std::vector<uint16_t> weights;  // kept: fresh pages would cost more than decoding
    weights.resize(kTile * steps_ * kStepValues + kStepValues);
    const auto address = reinterpret_cast<uintptr_t>(weights.data());
    for (int spin = 0; rotated_.load(std::memory_order_acquire) < tokens_; ++spin) {
      if (spin > 10000) std::this_thread::yield();
    }
    while (tiles_.take(&begin, &end)) multiply(begin, weights.data() + (64 - address % 64) % 64 / 2);
  }

  // Blocks differ by one token at most, so that none is left with few.
  int64_t first_token(int64_t block) const { return tokens_ * block / blocks_; }

  void rotate(int64_t token, float* values) {
    common_.rotate_input(plan_, x_ + token * plan_.in_features * size_, dtype_, values);
    space_.sums[token] = sum_of(values, layout_.columns);
    int64_t block = token * blocks_ / tokens_;
    while (first_token(block + 1) <= token) ++block;
    const int64_t first = first_token(block);
    const int count = static_cast<int>(first_token(block + 1) - first);
    uint16_t* to = activations_ + first * steps_ * kStepValues;
    const int index = static_cast<int>(token - first);
    dense_.arrange(values, layout_.full_groups, index, count, to);
    if (layout_.rest == 0) return;
    // One more group, of which only the first lanes are kept.
    std::fill_n(values + layout_.columns, kLanes * kTile, 0.0f);
    alignas(64) uint16_t group[kGroupSteps * kStepValues], packed[kGroupSteps * kStepValues] = {};
    dense_.arrange(values + layout_.full_groups * kLanes * kTile, 1, 0, 1, group);
    pack_rest(group, kStepValues, packed);
    for (int64_t s = 0; s < rest_steps_; ++s) {
      std::memcpy(to + ((steps_ - rest_steps_ + s) * count + index) * kStepValues, packed + s * kStepValues,
                  kStepValues * sizeof(uint16_t));
    }
  }

  // The first `rest` lanes of both halves of the 8 vectors of a group, `stride` values apart, without gaps.
  void pack_rest(const uint16_t* group, int64_t stride, uint16_t* packed) const {
    for (int p = 0; p < kGroupSteps; ++p) {
      for (int half = 0; half < 2; ++half) {
        std::memcpy(packed, group + p * stride + half * kLanes, layout_.rest * sizeof(uint16_t));
        packed += layout_.rest;
      }
    }
  }

  void decode(int64_t tile, uint16_t* weights) const {
    const int words = 8 * plan_.bits;
    const auto step = dense_.decode[plan_.bits - 1];
    step(codes_ + tile * layout_.in_tiles * words, layout_.full_groups, plan_.multiplier, 0, steps_, weights);
    if (layout_.rest == 0) return;
    alignas(64) uint32_t gathered[kMaxLanes * 64];
    alignas(64) uint16_t group[kTile * kGroupSteps * kStepValues];
    layout_.gather_rest(codes_, words, tile, 1, gathered);
    step(gathered, 1, plan_.multiplier, 0, kGroupSteps, group);
    for (int row = 0; row < kTile; ++row) {
      alignas(64) uint16_t packed[kGroupSteps * kStepValues] = {};
      const int64_t block = row / kDenseRows, within = row % kDenseRows;
      pack_rest(group + (block * kGroupSteps * kDenseRows + within) * kStepValues, kDenseRows * kStepValues, packed);
      for (int64_t s = 0; s < rest_steps_; ++s) {
        std::memcpy(weights + ((block * steps_ + steps_ - rest_steps_ + s) * kDenseRows + within) * kStepValues,
                    packed + s * kStepValues, kStepValues * sizeof(uint16_t));
      }
    }
  }

  void multiply(int64_t tile, uint16_t* weights) {
    decode(tile, weights);
    const int64_t out_block = tile / layout_.block_tiles;
    float* const rotated_block = space_.product.data() + out_block * tokens_ * plan_.output_block;
    float* const product = rotated_block + tile % layout_.block_tiles * kTile;
    float unit[kTile];
    for (int r = 0; r < kTile; ++r) unit[r] = from_float16(scale_[tile * kTile + r]) * plan_.inverse_deviation;
    for (int64_t block = 0; block < blocks_; ++block) {
      const int64_t first = first_token(block);
      const int count = static_cast<int>(first_token(block + 1) - first);
      alignas(64) float sums[kTile * kDenseTokens * kLanes];
      for (int64_t s = 0; s < steps_; s += kChunkSteps) {
        const uint16_t* x = activations_ + (first * steps_ + s * count) * kStepValues;
        for (int b = 0; b < kTile / kDenseRows; ++b) {
          dense_.multiply[count - 1](weights + (b * steps_ + s) * kDenseRows * kStepValues, x,
                                     std::min(kChunkSteps, steps_ - s), s == 0, sums + b * kDenseRows * count * kLanes);
        }
      }
      for (int t = 0; t < count; ++t) {
        dense_.finish(sums, t, count, plan_.mean_offset * space_.sums[first + t], unit,
                      product + (first + t) * plan_.output_block);
      }
    }
    if (space_.done[out_block].fetch_add(1, std::memory_order_acq_rel) + 1 < layout_.block_tiles) return;
    for (int64_t m = 0; m < tokens_; ++m) {
      common_.rotate_output(plan_, out_block, out_scale_, rotated_block + m * plan_.output_block, dtype_,
                            y_ + m * plan_.out_features * size_);
    }
  }

  const hyper_shift_plan& plan_;
  const uint32_t* codes_;
  const uint16_t *scale_, *out_scale_;
  const char* x_;
  char* y_;
  const int dtype_, size_;
  const int64_t tokens_, blocks_;
  const DenseSteps& dense_;
  const MatmulSteps& common_;
  const ShiftLayout layout_;
  const int64_t rest_steps_, steps_;
  Workspace& space_;
  uint16_t* activations_;
  WorkCounter to_rotate_, tiles_;
  std::atomic<int64_t> rotated_{0};
};

}  // namespace

bool multiply_shift_dense(const hyper_shift_plan& plan, const uint32_t* codes, const uint16_t* scale,
                          const uint16_t* out_scale, const void* x, int dtype, int64_t tokens, int threads, void* y) {
  const DenseSteps* steps = dense_steps();
  if (steps == nullptr) return false;
  static thread_local Workspace space;
  const int64_t size = dtype == HYPER_FLOAT32 ? 4 : 2;
  for (int64_t begin = 0; begin < tokens; begin += kTokensAtOnce) {
    Dense dense(plan, *steps, codes, scale, out_scale, static_cast<const char*>(x) + begin * plan.in_features * size,
                dtype, std::min(kTokensAtOnce, tokens - begin),
                static_cast<char*>(y) + begin * plan.out_features * size, space);
    dense.run(threads);
  }
  return true;
}

}  // namespace hyper

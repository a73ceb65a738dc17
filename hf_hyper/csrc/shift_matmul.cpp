// Fused product for few tokens: rotate, multiply straight from the stored codes, rotate back, in one job of the pool.
//
// Tokens go through in chunks of up to 8; a chunk decodes every weight once. The job has two phases. First the threads
// take tokens, rotate them and arrange them in lanes. Then they take strips of output tiles; whoever finishes the last
// strip of an output block rotates that block back and writes it.
#include "shift_matmul.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>
#include <vector>

#include "float16_inl.h"
#include "shift_matmul_layout.h"
#include "thread_pool.h"

namespace hyper {
namespace {

// Buffers of one call, kept by the calling thread for its next one.
struct Workspace {
  std::vector<float> rotated;         // [form, in_tiles * 16, rounded up to groups]
  std::vector<uint32_t> activations;  // as in shift_matmul_steps.h, full groups and then the ragged one
  std::vector<float> product;         // [tokens, padded_out]
  std::vector<std::atomic<int>> done;  // output tiles finished, by block
};

class Chunk {
 public:
  Chunk(const hyper_shift_plan& plan, const uint32_t* codes, const uint16_t* scale, const uint16_t* out_scale,
        const char* x, int dtype, int tokens, bool int8, int threads, char* y, Workspace& space)
      : plan_(plan), codes_(codes), scale_(scale), out_scale_(out_scale), x_(x), y_(y), dtype_(dtype),
        size_(dtype == HYPER_FLOAT32 ? 4 : 2), tokens_(tokens), form_(token_form(tokens)), wide_(kTokenForms[form_]),
        int8_(int8), steps_(matmul_steps()), layout_(plan, steps_.lanes, threads), space_(space),
        multiply_((int8 ? steps_.int8 : steps_.exact)[plan.bits - 1][form_]), to_rotate_(wide_, 1),
        strips_(layout_.strips, std::max<int64_t>(1, layout_.strips / (8 * threads))) {
    const int64_t group_words = activation_rows(int8) * wide_ * layout_.lanes;
    ragged_ = layout_.full_groups * group_words;
    space.rotated.resize(wide_ * layout_.columns);
    space.activations.resize(ragged_ + (layout_.rest > 0 ? group_words : 0) + kAlign);
    space.product.resize(tokens * layout_.out_tiles * kTile);
    if (static_cast<int64_t>(space.done.size()) < layout_.blocks) {
      space.done = std::vector<std::atomic<int>>(layout_.blocks);
    }
    for (int64_t block = 0; block < layout_.blocks; ++block) space.done[block].store(0, std::memory_order_relaxed);
    const auto address = reinterpret_cast<uintptr_t>(space.activations.data());
    activations_ = space.activations.data() + (64 - address % 64) % 64 / 4;
  }

  void run(int threads) {
    run_on_threads(threads, [this] { work(); });
  }

 private:
  static constexpr int kAlign = 16;

  void work() {
    int64_t begin, end;
    while (to_rotate_.take(&begin, &end)) {
      rotate(static_cast<int>(begin));
      rotated_.fetch_add(1, std::memory_order_release);
    }
    for (int spin = 0; rotated_.load(std::memory_order_acquire) < wide_; ++spin) {
      if (spin > 10000) std::this_thread::yield();
    }
    while (strips_.take(&begin, &end)) {
      for (int64_t strip = begin; strip < end; ++strip) multiply(strip);
    }
  }

  void rotate(int token) {
    float* values = space_.rotated.data() + token * layout_.columns;
    if (token < tokens_) {
      steps_.rotate_input(plan_, x_ + token * plan_.in_features * size_, dtype_, values);
      sum_[token] = sum_of(values, layout_.in_tiles * kTile);
    } else {
      std::fill_n(values, layout_.in_tiles * kTile, 0.0f);
    }
    steps_.arrange(values, layout_.full_groups, int8_, token, wide_, activations_);
    if (layout_.rest == 0) return;
    float ragged[kMaxLanes * kTile] = {};
    const int64_t count = layout_.rest * kTile;
    for (int s = 0; s < layout_.segments; ++s) {
      std::copy_n(values + layout_.in_tiles * kTile - count, count, ragged + s * count);
    }
    steps_.arrange(ragged, 1, int8_, token, wide_, activations_ + ragged_);
  }

  // Output tiles strip * segments and following.
  void multiply(int64_t strip) {
    alignas(64) float sums[kTile * kMaxTokens * kMaxLanes];
    float totals[kMaxLanes][kTile * kMaxTokens];
    float ragged[kTile * kMaxTokens * kMaxLanes];
    const size_t cleared = sizeof(float) * kTile * wide_ * layout_.lanes;
    const int words = 8 * plan_.bits;
    const int64_t first = strip * layout_.segments;
    for (int s = 0; s < layout_.segments; ++s) {
      std::memset(sums, 0, cleared);
      multiply_(codes_ + (first + s) * layout_.in_tiles * words, layout_.full_groups, activations_, plan_.multiplier,
                sums);
      steps_.reduce(sums, kTile * wide_, 1, layout_.lanes, totals[s]);
    }
    if (layout_.rest > 0) {
      alignas(64) uint32_t gathered[kMaxLanes * 64];
      layout_.gather_rest(codes_, words, first, layout_.segments, gathered);
      std::memset(sums, 0, cleared);
      multiply_(gathered, 1, activations_ + ragged_, plan_.multiplier, sums);
      steps_.reduce(sums, kTile * wide_, layout_.segments, layout_.rest, ragged);
      for (int s = 0; s < layout_.segments; ++s) {
        for (int i = 0; i < kTile * wide_; ++i) totals[s][i] += ragged[i * layout_.segments + s];
      }
    }
    for (int s = 0; s < layout_.segments; ++s) {
      for (int r = 0; r < kTile; ++r) {
        const int64_t row = (first + s) * kTile + r;
        const float unit = from_float16(scale_[row]) * plan_.inverse_deviation;
        for (int m = 0; m < tokens_; ++m) {
          const float centred = totals[s][r * wide_ + m] - plan_.mean_offset * sum_[m];
          space_.product[m * layout_.out_tiles * kTile + row] = centred * unit;
        }
      }
    }
    const int64_t block = first / layout_.block_tiles;
    const int before = space_.done[block].fetch_add(layout_.segments, std::memory_order_acq_rel);
    if (before + layout_.segments == layout_.block_tiles) {
      for (int m = 0; m < tokens_; ++m) {
        steps_.rotate_output(plan_, block, out_scale_,
                             space_.product.data() + m * layout_.out_tiles * kTile + block * plan_.output_block,
                             dtype_, y_ + m * plan_.out_features * size_);
      }
    }
  }

  const hyper_shift_plan& plan_;
  const uint32_t* codes_;
  const uint16_t *scale_, *out_scale_;
  const char* x_;
  char* y_;
  const int dtype_, size_, tokens_, form_, wide_;  // wide_: tokens the kernel computes, tokens_ and then zeros
  const bool int8_;
  const MatmulSteps& steps_;
  const ShiftLayout layout_;
  Workspace& space_;
  const MultiplyStep multiply_;
  uint32_t* activations_;
  int64_t ragged_;  // where the ragged group's activations begin
  float sum_[kMaxTokens] = {};
  WorkCounter to_rotate_, strips_;
  std::atomic<int> rotated_{0};
};

}  // namespace

void multiply_shift(const hyper_shift_plan& plan, const uint32_t* codes, const uint16_t* scale,
                    const uint16_t* out_scale, const void* x, int dtype, int64_t tokens, bool int8, int threads,
                    void* y) {
  static thread_local Workspace space;
  const int64_t size = dtype == HYPER_FLOAT32 ? 4 : 2;
  for (int64_t begin = 0; begin < tokens; begin += kMaxTokens) {
    const int count = static_cast<int>(std::min<int64_t>(kMaxTokens, tokens - begin));
    Chunk chunk(plan, codes, scale, out_scale, static_cast<const char*>(x) + begin * plan.in_features * size, dtype,
                count, int8, threads, static_cast<char*>(y) + begin * plan.out_features * size, space);
    chunk.run(threads);
  }
}

}  // namespace hyper

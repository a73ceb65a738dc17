// Fused product for few tokens: rotate, multiply straight from the stored codes, rotate back, in one job of the pool.
//
// Tokens go through in chunks of up to 8; a chunk decodes every weight once. The job has two phases. First the threads
// take tokens, rotate them and arrange them; each already holds its first output tiles, whose codes come meanwhile. Then
// they multiply these and take more; whoever finishes the last tile of an output block rotates that block back and writes
// it.
#include "shift_matmul.h"

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "aligned.h"
#include "float16_inl.h"
#include "shift_layout.h"
#include "thread_pool.h"

namespace hyper {
namespace {

// Buffers of one call, kept by the calling thread for its next one.
struct Workspace {
  AlignedVector<float> rotated;         // [form, in_tiles * 16]
  AlignedVector<uint32_t> activations;  // as in shift_matmul_steps.h
  AlignedVector<float> product;         // [tokens, padded_out]
  std::vector<std::atomic<int>> done;   // output tiles finished, by block
};

// Rounding to 16 bits adds an error of about 2e-5: a hundredth of the rounding of bfloat16, a tenth of that of float16.
Activations held_as(const MatmulSteps& steps, bool int8, int dtype) {
  return int8 ? kInt8 : steps.int16 && dtype != HYPER_FLOAT32 ? kInt16 : kFloat;
}

class Chunk {
 public:
  Chunk(const hyper_shift_plan& plan, const uint32_t* codes, const uint16_t* scale, const uint16_t* out_scale,
        const char* x, int dtype, int tokens, bool int8, int threads, char* y, Workspace& space)
      : plan_(plan), codes_(codes), scale_(scale), out_scale_(out_scale), x_(x), y_(y), dtype_(dtype),
        size_(dtype == HYPER_FLOAT32 ? 4 : 2), tokens_(tokens), form_(token_form(tokens)), wide_(kTokenForms[form_]),
        steps_(matmul_steps()), kind_(held_as(steps_, int8, dtype)), layout_(plan), space_(space),
        multiply_(steps_.multiply[kind_][plan.bits - 1][form_]), to_rotate_(wide_, 1),
        to_multiply_(layout_.out_tiles, std::max<int64_t>(1, layout_.out_tiles / (16 * threads))) {
    space.rotated.resize(wide_ * layout_.columns);
    space.activations.resize(record_words(kind_) * wide_ * layout_.in_tiles);
    space.product.resize(tokens * layout_.out_tiles * kTile);
    if (static_cast<int64_t>(space.done.size()) < layout_.blocks) {
      space.done = std::vector<std::atomic<int>>(layout_.blocks);
    }
    for (int64_t block = 0; block < layout_.blocks; ++block) space.done[block].store(0, std::memory_order_relaxed);
  }

  void run(int threads) {
    run_on_threads(threads, [this] { work(); });
  }

 private:
  void work() {
    int64_t begin, end, tile = 0, last = 0;
    bool more = take_tiles(&tile, &last);
    while (to_rotate_.take(&begin, &end)) {
      rotate(static_cast<int>(begin));
      rotated_.fetch_add(1, std::memory_order_release);
    }
    for (int spin = 0; rotated_.load(std::memory_order_acquire) < wide_; ++spin) {
      if (spin > 10000) std::this_thread::yield();
    }
    for (; more; more = take_tiles(&tile, &last)) {
      for (; tile < last; ++tile) multiply(tile);
    }
  }

  // Takes some of the output tiles that are left, false if none, and asks for the codes that the first of them begins with.
  bool take_tiles(int64_t* begin, int64_t* end) {
    if (!to_multiply_.take(begin, end)) return false;
    const uint32_t* from = codes_ + *begin * layout_.tile_words;
    for (int64_t i = 0; i < std::min<int64_t>(kCodesAhead, layout_.tile_words); i += 16) {
      __builtin_prefetch(from + i, 0, 3);
    }
    return true;
  }

  void rotate(int token) {
    float* values = space_.rotated.data() + token * layout_.columns;
    if (token < tokens_) {
      sum_[token] = steps_.rotate_input(plan_, x_ + token * plan_.in_features * size_, dtype_, values);
    } else {
      std::fill_n(values, layout_.columns, 0.0f);
    }
    steps_.arrange(values, layout_.in_tiles, kind_, token, wide_, space_.activations.data());
  }

  void multiply(int64_t tile) {
    float totals[kMaxTokens * kTile];
    multiply_(codes_ + tile * layout_.tile_words, layout_.in_tiles, space_.activations.data(), plan_.multiplier, totals);
    finish(tile, totals);
  }

  // totals [tokens, 16] of one output tile.
  void finish(int64_t tile, const float* totals) {
    float units[kTile];
    for (int r = 0; r < kTile; ++r) units[r] = from_float16(scale_[tile * kTile + r]) * plan_.inverse_deviation;
    for (int m = 0; m < tokens_; ++m, totals += kTile) {
      float* to = space_.product.data() + (m * layout_.out_tiles + tile) * kTile;
      for (int r = 0; r < kTile; ++r) to[r] = (totals[r] - plan_.mean_offset * sum_[m]) * units[r];
    }
    const int64_t block = tile / layout_.block_tiles;
    if (space_.done[block].fetch_add(1, std::memory_order_acq_rel) + 1 < layout_.block_tiles) return;
    steps_.rotate_output(plan_, block, out_scale_, space_.product.data() + block * plan_.output_block, tokens_,
                         layout_.out_tiles * kTile, dtype_, y_);
  }

  const hyper_shift_plan& plan_;
  const uint32_t* codes_;
  const uint16_t *scale_, *out_scale_;
  const char* x_;
  char* y_;
  const int dtype_, size_, tokens_, form_, wide_;  // wide_: tokens the kernel computes, tokens_ and then zeros
  const MatmulSteps& steps_;
  const Activations kind_;
  const ShiftLayout layout_;
  Workspace& space_;
  const MultiplyStep multiply_;
  float sum_[kMaxTokens] = {};
  WorkCounter to_rotate_, to_multiply_;
  std::atomic<int> rotated_{0};
};

}  // namespace

void multiply_shift(const hyper_shift_plan& plan, const uint32_t* codes, const uint16_t* scale,
                    const uint16_t* out_scale, const void* x, int dtype, int64_t tokens, bool int8, int threads,
                    void* y) {
  static thread_local Workspace space;
  const int64_t size = dtype == HYPER_FLOAT32 ? 4 : 2;
  if (tokens > 1) int8 = false;  // the others are as fast and more accurate, and there are no such steps
  for (int64_t begin = 0; begin < tokens; begin += kMaxTokens) {
    const int count = static_cast<int>(std::min<int64_t>(kMaxTokens, tokens - begin));
    Chunk chunk(plan, codes, scale, out_scale, static_cast<const char*>(x) + begin * plan.in_features * size, dtype,
                count, int8, threads, static_cast<char*>(y) + begin * plan.out_features * size, space);
    chunk.run(threads);
  }
}

}  // namespace hyper

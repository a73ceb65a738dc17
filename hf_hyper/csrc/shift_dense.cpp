// Product for many tokens: every weight of `shift` is decoded once for up to 512 of them. Whoever finishes the last rows of a
// block of the output rotation rotates that block back and writes it.
#include <algorithm>
#include <atomic>
#include <type_traits>
#include <vector>

#include "dense_product.h"
#include "float16_inl.h"
#include "shift_layout.h"
#include "shift_matmul.h"

namespace hyper {
namespace {

struct Workspace {
  AlignedVector<float> product;        // [output blocks, tokens, output_block]
  std::vector<float> sums;             // of each token's rotated values
  std::vector<std::atomic<int>> done;  // output tiles finished, by block
};

// Of the calling thread, for its next call.
Workspace& workspace() {
  static thread_local Workspace space;
  return space;
}

template <class Form>
class ShiftWeight {
 public:
  ShiftWeight(const hyper_shift_plan& plan, const DenseSteps& dense, const uint32_t* codes, const uint16_t* scale,
              const uint16_t* out_scale, const char* x, int dtype, int64_t tokens, char* y, Workspace& space)
      : plan_(plan), codes_(codes), scale_(scale), out_scale_(out_scale), x_(x), y_(y), dtype_(dtype),
        size_(dtype == HYPER_FLOAT32 ? 4 : 2), tokens_(tokens), layout_(plan), dense_(dense), space_(space) {
    space.product.resize(static_cast<size_t>(tokens * layout_.out_tiles * kTile));
    space.sums.resize(static_cast<size_t>(tokens));
    if (static_cast<int64_t>(space.done.size()) < layout_.blocks) {
      space.done = std::vector<std::atomic<int>>(static_cast<size_t>(layout_.blocks));
    }
    for (int64_t block = 0; block < layout_.blocks; ++block) space.done[block].store(0, std::memory_order_relaxed);
  }

  int64_t columns() const { return layout_.columns; }
  int64_t row_blocks() const { return (layout_.out_tiles + 1) / 2; }

  void load(int64_t token, float* values) const {
    dense_.rotate(plan_, x_ + token * plan_.in_features * size_, dtype_, values);
  }

  void loaded(int64_t token, float sum) { space_.sums[token] = sum; }

  void decode(int64_t row_block, int64_t tile, int64_t tiles, typename Form::Weight* weights) const {
    // A last tile keeps itself company.
    const int64_t next = tiles_of(row_block) == 2 ? layout_.tile_words : 0;
    const uint32_t* codes = codes_ + 2 * row_block * layout_.tile_words + tile * 8 * plan_.bits;
    if constexpr (kBytes) {
      dense_.decode_shift_bytes[plan_.bits - 1](codes, next, tiles, plan_.multiplier, weights);
    } else {
      dense_.decode_shift[plan_.bits - 1](codes, next, tiles, plan_.multiplier, weights);
    }
  }

  void finish(int64_t row_block, const float* sums) {
    const int tiles = tiles_of(row_block);
    const int64_t first = 2 * row_block;
    float units[kPanelRows] = {};
    for (int r = 0; r < tiles * kTile; ++r) {
      units[r] = from_float16(scale_[first * kTile + r]) * plan_.inverse_deviation * (kBytes ? 4 : 1);
    }
    float* to[2] = {product(first), tiles == 2 ? product(first + 1) : nullptr};
    float offset = plan_.mean_offset;
    if (kBytes) offset = mean_byte_quarter(kByteCentre + offset) - kQuarterCentre;
    dense_.finish_shift(sums, tokens_, plan_.bits % 2 == 1, offset, space_.sums.data(), units, to, plan_.output_block);
    for (int i = 0; i < tiles; ++i) {
      const int64_t block = (first + i) / layout_.block_tiles;
      if (space_.done[block].fetch_add(1, std::memory_order_acq_rel) + 1 < layout_.block_tiles) continue;
      dense_.rotate_output(plan_, block, out_scale_, product(block * layout_.block_tiles), tokens_,
                           plan_.output_block, dtype_, y_);
    }
  }

 private:
  static constexpr bool kBytes = std::is_same_v<Form, Bytes>;

  int tiles_of(int64_t row_block) const { return 2 * row_block + 1 < layout_.out_tiles ? 2 : 1; }

  // Of an output tile and the first token; tokens are `output_block` values apart.
  float* product(int64_t tile) {
    return space_.product.data() + tile / layout_.block_tiles * tokens_ * plan_.output_block +
           tile % layout_.block_tiles * kTile;
  }

  const hyper_shift_plan& plan_;
  const uint32_t* codes_;
  const uint16_t *scale_, *out_scale_;
  const char* x_;
  char* y_;
  const int dtype_, size_;
  const int64_t tokens_;
  const ShiftLayout layout_;
  const DenseSteps& dense_;
  Workspace& space_;
};

template <class Form>
void multiply(const hyper_shift_plan& plan, const DenseSteps& steps, const uint32_t* codes, const uint16_t* scale,
              const uint16_t* out_scale, const char* x, int dtype, int64_t tokens, int threads, char* y) {
  const int64_t size = dtype == HYPER_FLOAT32 ? 4 : 2;
  in_parts(plan.out_features, tokens, threads, [&](int64_t begin, int64_t count, int on_threads) {
    ShiftWeight<Form> weight(plan, steps, codes, scale, out_scale, x + begin * plan.in_features * size, dtype, count,
                             y + begin * plan.out_features * size, workspace());
    DenseProduct<Form, ShiftWeight<Form>>(weight, steps, count, on_threads).run(on_threads);
  });
}

}  // namespace

bool multiply_shift_dense(const hyper_shift_plan& plan, const uint32_t* codes, const uint16_t* scale,
                          const uint16_t* out_scale, const void* x, int dtype, int64_t tokens, bool int8, int threads,
                          void* y) {
  const DenseSteps* steps = dense_steps();
  if (steps == nullptr) return false;
  const auto run = int8 ? multiply<Bytes> : multiply<Pairs>;
  run(plan, *steps, codes, scale, out_scale, static_cast<const char*>(x), dtype, tokens, threads,
      static_cast<char*>(y));
  return true;
}

}  // namespace hyper
